//! Languages that the configuration promises in image `rootfs`, and what to do
//! where it lacks one.

/// Packages of Debian and Ubuntu that are not called as their program is.
const PACKAGES: [(&str, &str); 4] =
    [("node", "nodejs"), ("go", "golang-go"), ("java", "default-jre-headless"), ("php", "php-cli")];

/// Either the root file system or the promise has to change.
pub(super) fn fix(wanted: &[String], missing: &[impl AsRef<str>]) -> String {
    let is_missing = |language: &&str| missing.iter().any(|other| other.as_ref() == *language);
    let wanted = || wanted.iter().map(String::as_str);
    let packages: Vec<&str> = wanted().map(package).collect();
    let there: Vec<&str> = wanted().filter(|language| !is_missing(language)).collect();
    let promise = if there.is_empty() {
        "take them out of providers.proot.languages".to_owned()
    } else {
        format!(
            "set providers.proot.languages (STACYVM_PROVIDERS_PROOT_LANGUAGES={}) to what sandboxes need",
            there.join(",")
        )
    };
    format!(
        "make one that has them, `sudo stacyvm rootfs build --include {} DIRECTORY`, and set \
         providers.proot.rootfs_path (STACYVM_PROOT_ROOTFS) to it; or {promise}",
        packages.join(",")
    )
}

fn package(language: &str) -> &str {
    PACKAGES.iter().find(|(program, _)| *program == language).map_or(language, |(_, package)| package)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fix_names_the_packages_and_the_setting() {
        let wanted = ["python3", "node", "bash"].map(str::to_owned);
        let some = fix(&wanted, &["node"]);
        assert!(some.contains("rootfs build --include python3,nodejs,bash DIRECTORY"), "{some}");
        assert!(some.contains("STACYVM_PROVIDERS_PROOT_LANGUAGES=python3,bash)"), "{some}");
        let all = fix(&wanted, &wanted);
        assert!(all.ends_with("take them out of providers.proot.languages"), "{all}");
    }
}
