//! Translation of paths by PRoot: no root, no kernel features, no isolation.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::super::host::Host;
use super::super::install::{Package, install};
use super::{Server, Wishes};
use crate::check::{Check, Status};
use crate::commands::serve::examine_one;

const WORKSPACE: &str = "proot.workspace";
const NAMESPACES: &str = "proot.namespaces";
/// Of the default, and what a server makes in a base that somebody named.
const BASE_FIX: &str =
    "set providers.proot.workspace_base to a directory that everybody may pass, such as /var/lib/stacyvm-proot";

/// What a server with this configuration would say of itself, and its
/// directories, which it is not asked about: it looks elsewhere here.
pub(super) async fn check(host: &Host, wishes: &Wishes<'_>) -> Vec<Check> {
    let Some(server) = &wishes.server else { return vec![binary(host, wishes)] };
    let said = match examine_one("proot", server.config, server.environment, server.demands_key).await {
        Ok(report) => report,
        Err(error) => {
            let fix = "stacyvm doctor --verbose, after the first fix above";
            return vec![binary(host, wishes), Check::fail("proot", format!("cannot be tried: {error:#}"), fix)];
        }
    };
    let mut checks: Vec<Check> = said.findings.into_iter().map(Check::from).collect();
    checks.retain(|check| check.name != WORKSPACE);
    for check in checks.iter_mut().filter(|check| check.name == "proot.binary" && check.status != Status::Pass) {
        check.fix = Some(install(host, Package::Proot));
    }
    let is_shared = checks.iter().any(|check| check.name == NAMESPACES && check.status != Status::Pass);
    checks.push(workspace(host, server, is_shared));
    checks
}

fn binary(host: &Host, wishes: &Wishes<'_>) -> Check {
    const NAME: &str = "proot.binary";
    let name = wishes.text("providers.proot.proot_binary");
    match host.program(&name) {
        Some(path) => Check::pass(NAME, format!("is {}", path.display())),
        None => Check::fail(NAME, format!("{name} is not installed"), install(host, Package::Proot)),
    }
}

/// Where sandboxes' files go. Without namespaces those of root's server belong
/// to other users, who have to get there.
fn workspace(host: &Host, server: &Server<'_>, is_shared: bool) -> Check {
    let others_pass = is_shared && host.is_root;
    let Some(base) = &server.config.proot.workspace_base else {
        let shown = server.data_dir.display();
        if others_pass {
            let message = format!("sandboxes run as users of their own, who cannot pass {shown}");
            return Check::fail(WORKSPACE, message, BASE_FIX);
        }
        return Check::pass(WORKSPACE, format!("sandboxes are kept in {shown}"));
    };
    let shown = base.display();
    let nearest = base.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !nearest.is_dir() {
        let message = format!("{shown} cannot be made: {} is no directory", nearest.display());
        return Check::fail(WORKSPACE, message, BASE_FIX);
    }
    if !host.is_writable(nearest) {
        let fix =
            format!("mkdir -p {shown}, for the user who runs the server, on a file system that can be written to");
        return Check::fail(WORKSPACE, format!("{} cannot be written to", nearest.display()), fix);
    }
    match first_closed(nearest).filter(|_| others_pass) {
        Some(closed) => {
            let message = format!("sandboxes run as users of their own, who cannot pass {}", closed.display());
            Check::fail(WORKSPACE, message, format!("chmod o+x {}", closed.display()))
        }
        None => Check::pass(WORKSPACE, format!("sandboxes are kept in {shown}")),
    }
}

/// The outermost directory on the way that others may not pass.
fn first_closed(path: &Path) -> Option<PathBuf> {
    let ancestors: Vec<&Path> = path.ancestors().collect();
    let is_closed = |path: &&Path| path.metadata().is_ok_and(|metadata| metadata.mode() & 0o001 == 0);
    ancestors.into_iter().rev().find(is_closed).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::config::{self, Environment};

    #[tokio::test]
    async fn without_a_configuration_the_program_is_looked_for() {
        let root = tempfile::tempdir().unwrap();
        let (host, wishes) = (Host::below(root.path()), Wishes::default());
        let checks = check(&host, &wishes).await;
        assert_eq!((checks.len(), checks[0].name.as_str(), checks[0].status), (1, "proot.binary", Status::Fail));
    }

    #[test]
    fn users_of_their_own_have_to_get_to_the_workspace() {
        let home = tempfile::tempdir().unwrap();
        let below = |name: &str| home.path().join(name);
        fs::set_permissions(home.path(), Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(below("closed/base")).unwrap();
        fs::set_permissions(below("closed"), Permissions::from_mode(0o700)).unwrap();
        fs::write(below("file"), "").unwrap();
        let environment = Environment { current_dir: home.path().to_owned(), ..Environment::default() };
        let look = |base: Option<PathBuf>, is_shared| {
            let mut config = config::load(None, &environment).unwrap().config;
            config.proot.workspace_base = base;
            let server =
                Server { config: &config, environment: &environment, data_dir: home.path(), demands_key: true };
            let mut host = Host::this(None, None);
            host.is_root = true;
            let found = workspace(&host, &server, is_shared);
            (found.status, found.fix.unwrap_or_default())
        };
        assert_eq!(look(None, false).0, Status::Pass);
        assert_eq!(look(None, true), (Status::Fail, BASE_FIX.to_owned()));
        assert_eq!(look(Some(below("new/base")), true).0, Status::Pass);
        let closed = look(Some(below("closed/base")), true);
        assert_eq!(closed, (Status::Fail, format!("chmod o+x {}", below("closed").display())));
        assert_eq!(look(Some(below("closed/base")), false).0, Status::Pass);
        assert_eq!(look(Some(below("file/base")), false).0, Status::Fail);
    }
}
