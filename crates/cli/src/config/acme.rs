//! What `server.acme` says, in the terms of the crate that acts on it, and what
//! is wrong with it.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use stacyvm_server::{AcmeOptions, DnsHook, ExternalAccount, check_acme_options, is_certifiable};

use crate::config::load::Environment;
use crate::config::problem::Problem;
use crate::config::schema::{Acme, Config};
use crate::config::setting::Secret;

/// Where the account and the certificates are kept, in the data directory.
const STATE_DIR: &str = "acme";

/// Where programs are looked for if the server itself was not told.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The options, if certificates come from a CA.
pub(crate) fn options(config: &Config, data_dir: &Path, environment: &Environment) -> Option<AcmeOptions> {
    let acme = &config.acme;
    let key = acme.eab_hmac_key.as_ref().and_then(hmac_key);
    acme.enabled.then(|| AcmeOptions {
        directory_url: acme.directory_url.trim().to_owned(),
        contact_email: acme.email.trim().to_owned(),
        external_account: key.map(|hmac_key| ExternalAccount { key_id: acme.eab_key_id.trim().to_owned(), hmac_key }),
        ca_file: acme.ca_file.clone(),
        state_dir: data_dir.join(STATE_DIR),
        names: names(config),
        dns_hook: acme.dns_hook.as_ref().map(|program| DnsHook {
            program: program.clone(),
            environment: hook_environment(acme, environment),
            timeout: acme.dns_hook_timeout.get(),
            settle: acme.dns_wait.get(),
        }),
    })
}

/// What no setting of it can say by itself.
pub(super) fn check(config: &Config, environment: &Environment, problems: &mut Vec<Problem>) {
    let Some(options) = options(config, &PathBuf::new(), environment) else { return };
    let acme = &config.acme;
    let mut wrong = |key: &str, message: String, hint: &str| {
        problems.push(Problem::new(format!("server.acme.{key}"), message).hint(hint));
    };
    if config.server.tls_cert_file.is_some() || config.server.tls_key_file.is_some() {
        let message = "certificates come from server.tls_cert_file or from a CA, not from both".to_owned();
        wrong("enabled", message, "take one of the two out");
    }
    if !is_address(&options.contact_email) {
        let message = format!("`{}` is no address that the CA could write to", options.contact_email);
        wrong("email", message, "write one, such as ops@example.com");
    }
    if !acme.agree_terms {
        let message = "the CA issues nothing before its terms of service are agreed to".to_owned();
        wrong("agree_terms", message, "read them, then set it to true");
    }
    if let Some(hook) = &options.dns_hook {
        if !hook.program.is_absolute() {
            let message = format!("{} is no absolute path", hook.program.display());
            wrong("dns_hook", message, "write all of it, such as /etc/stacyvm/dns-hook");
        }
        if hook.timeout.is_zero() {
            wrong("dns_hook_timeout", "cannot be zero".to_owned(), "write 2m");
        }
    }
    for name in acme.dns_hook_env.iter().filter(|name| environment.get(name).is_none()) {
        let message = format!("the variable {name} is not set for the server");
        wrong("dns_hook_env", message, "set it, for example with EnvironmentFile= of the unit, or take it out");
    }
    if acme.eab_key_id.trim().is_empty() != acme.eab_hmac_key.is_none() {
        let message = "the id and the key of an account go together".to_owned();
        wrong("eab_key_id", message, "set both server.acme.eab_key_id and server.acme.eab_hmac_key_file");
    } else if acme.eab_hmac_key.as_ref().is_some_and(|key| hmac_key(key).is_none()) {
        wrong("eab_hmac_key", "is not base64".to_owned(), "copy it as the CA shows it");
    }
    if let Err(error) = check_acme_options(&options, Some(&config.server.preview_domain)) {
        problems.push(Problem::of(&error));
    }
}

/// Those listed, or those that the API answers to anyway.
fn names(config: &Config) -> Vec<String> {
    let acme = &config.acme;
    if !acme.names.is_empty() {
        return acme.names.clone();
    }
    let hosts = config.server.allowed_hosts.iter();
    let names = hosts.map(|host| host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name).trim_end_matches('.'));
    let can_be = |name: &&str| is_certifiable(name) && (acme.dns_hook.is_some() || !name.starts_with("*."));
    names.filter(can_be).map(str::to_owned).collect()
}

fn hook_environment(acme: &Acme, environment: &Environment) -> Vec<(String, String)> {
    let path = environment.get("PATH").unwrap_or(USUAL_PATH);
    let listed = acme.dns_hook_env.iter().filter(|name| *name != "PATH");
    let listed = listed.filter_map(|name| Some((name.clone(), environment.get(name)?.to_owned())));
    [("PATH".to_owned(), path.to_owned())].into_iter().chain(listed).collect()
}

/// CAs show it in either alphabet, with or without padding.
fn hmac_key(secret: &Secret) -> Option<Vec<u8>> {
    let text = secret.expose().trim().trim_end_matches('=');
    let key = URL_SAFE_NO_PAD.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text)).ok()?;
    (!key.is_empty()).then_some(key)
}

/// Enough that a slip of the fingers is noticed; the CA judges the rest.
fn is_address(text: &str) -> bool {
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic() && !b",;:?&<>\"".contains(&byte));
    plain && text.split_once('@').is_some_and(|(who, domain)| !who.is_empty() && domain.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::load;

    const WELL: &str = "enabled: true, email: ops@example.com, agree_terms: true";

    fn environment(dir: &Path, yaml: &str, variables: &[(&str, &str)]) -> Environment {
        std::fs::write(dir.join("stacyvm.yaml"), yaml).unwrap();
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        Environment { variables, current_dir: dir.to_owned(), ..Environment::default() }
    }

    fn read(server: &str, acme: &str, variables: &[(&str, &str)]) -> Result<AcmeOptions, String> {
        let dir = tempfile::tempdir().unwrap();
        let environment = environment(dir.path(), &format!("server: {{{server}, acme: {{{acme}}}}}\n"), variables);
        let loaded = load(None, &environment).map_err(|error| error.to_string())?;
        Ok(options(&loaded.config, Path::new("/data"), &environment).expect("it is enabled"))
    }

    #[test]
    fn without_a_word_nothing_is_ordered() {
        let dir = tempfile::tempdir().unwrap();
        let environment = environment(dir.path(), "server: {acme: {email: nobody}}\n", &[]);
        let config = load(None, &environment).unwrap().config;
        assert_eq!(options(&config, Path::new("/data"), &environment), None);
    }

    #[test]
    fn names_are_those_that_the_api_answers_to() {
        let hosts = "allowed_hosts: ['vm.example.com:8443', '*.vm.example.com', 10.0.0.1, localhost]";
        let without = read(hosts, WELL, &[]).unwrap();
        assert_eq!(without.names, ["vm.example.com"]);
        assert_eq!(without.state_dir, Path::new("/data/acme"));
        assert!(without.directory_url.contains("letsencrypt") && without.dns_hook.is_none());
        let hook = format!("{WELL}, dns_hook: /etc/hook, dns_hook_env: [DNS_TOKEN], dns_wait: 1s");
        let variables = [("DNS_TOKEN", "secret"), ("PATH", "/bin"), ("OTHER", "x")];
        let with = read(hosts, &hook, &variables).unwrap();
        assert_eq!(with.names, ["vm.example.com", "*.vm.example.com"]);
        assert!(!format!("{with:?}").contains("secret"));
        let mut environment = with.dns_hook.unwrap().environment;
        environment.sort();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(environment, [pair("DNS_TOKEN", "secret"), pair("PATH", "/bin")]);
        assert_eq!(read(hosts, &format!("{WELL}, names: [a.example.org]"), &[]).unwrap().names, ["a.example.org"]);
    }

    #[test]
    fn what_is_wrong_is_said_with_what_to_do() {
        let name = "allowed_hosts: [vm.example.com]";
        let hook = format!("{WELL}, dns_hook");
        for (server, acme, expected) in [
            (name, "enabled: true, agree_terms: true", "server.acme.email: `` is no address"),
            (name, "enabled: true, agree_terms: true, email: 'a@b.c, d@e.f'", "is no address"),
            (name, "enabled: true, email: ops@example.com", "server.acme.agree_terms: the CA issues nothing"),
            ("tls_cert_file: /c, tls_key_file: /k", WELL, "server.acme.enabled: certificates come from"),
            (name, &format!("{WELL}, directory_url: 'http://ca.example/dir'"), "server.acme.directory_url: `http://"),
            (name, &format!("{WELL}, directory_url: ''"), "server.acme.directory_url: `` is no https"),
            ("port: 443", WELL, "server.acme.names: there is no name"),
            (name, &format!("{WELL}, names: [10.0.0.1]"), "server.acme.names: `10.0.0.1` is no name"),
            (name, &format!("{WELL}, names: ['*.a.example']"), "`*.a.example` needs server.acme.dns_hook"),
            (name, &format!("{hook}: hook"), "server.acme.dns_hook: hook is no absolute path"),
            (name, &format!("{hook}: /hook, dns_hook_timeout: 0s"), "server.acme.dns_hook_timeout: cannot be zero"),
            (name, &format!("{hook}: /hook, dns_hook_env: [TOKEN]"), "the variable TOKEN is not set"),
            (name, &format!("{WELL}, eab_key_id: ours"), "server.acme.eab_key_id: the id and the key"),
            (name, &format!("{WELL}, eab_key_id: ours, eab_hmac_key: '!'"), "server.acme.eab_hmac_key: is not base64"),
        ] {
            let error = read(server, acme, &[]).unwrap_err();
            assert!(error.contains(expected), "{acme}: {error}");
        }
    }

    #[test]
    fn keys_of_accounts_come_in_two_alphabets() {
        let key = |text: &str| hmac_key(&Secret::new(text));
        assert_eq!(key("_-8="), Some(vec![255, 239]));
        assert_eq!(key(" /+8\n"), key("_-8"));
        assert_eq!((key(""), key("a b")), (None, None));
    }
}
