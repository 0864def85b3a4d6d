//! Every setting: its key, type, default and meaning, in one place.
//!
//! A section is a struct whose fields are settings. The macro below makes the
//! struct, the list of its keys and the code that reads it from one
//! declaration, so that none of them can fall behind.

use std::collections::BTreeMap;
use std::path::PathBuf;

use stacyvm_api::Duration;

use crate::config::load::Reader;
use crate::config::reserved::RESERVED;
use crate::config::setting::{MemorySize, Processors, Secret, Setting, Shape, choice};

/// One setting as documents and messages see it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: &'static str,
    pub(crate) shape: Shape,
    /// As it would be written in an environment variable.
    pub(crate) default: &'static str,
    /// Lines of the doc comment, for the page and for editors.
    pub(crate) doc: &'static [&'static str],
}

impl Entry {
    /// The doc comment in one line.
    pub(crate) fn meaning(&self) -> String {
        self.doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    /// `STACYVM_` and the key in upper case, dots as underscores.
    pub(crate) fn env_name(&self) -> String {
        format!("STACYVM_{}", self.key.replace('.', "_").to_uppercase())
    }
}

macro_rules! config {
    ($(
        $section:ident: $name:ident in $prefix:literal {
            $( $(#[doc = $doc:literal])+ $field:ident: $type:ty = $default:literal, )+
        }
    )+) => {
        /// The whole configuration, every default applied.
        #[derive(Debug, Clone)]
        pub(crate) struct Config {
            $(pub(crate) $section: $name,)+
        }

        impl Config {
            /// Reads every setting; what is wrong stays with the reader.
            pub(crate) fn read(reader: &mut Reader<'_>) -> Self {
                Self { $($section: $name::read(reader),)+ }
            }
        }

        /// Every setting that this version acts on, in the order of the page.
        pub(crate) fn entries() -> impl Iterator<Item = &'static Entry> {
            [].iter()$(.chain($name::ENTRIES))+
        }

        $(
            #[derive(Debug, Clone)]
            pub(crate) struct $name {
                $( $(#[doc = $doc])+ pub(crate) $field: $type,)+
            }

            impl $name {
                const ENTRIES: &[Entry] = &[$(
                    Entry {
                        key: concat!($prefix, stringify!($field)),
                        shape: <$type as Setting>::SHAPE,
                        default: $default,
                        doc: &[$($doc),+],
                    },
                )+];

                fn read(reader: &mut Reader<'_>) -> Self {
                    let mut entries = Self::ENTRIES.iter();
                    Self {
                        $($field: {
                            let entry = entries.next().expect("one entry per field");
                            reader.read::<$type>(entry)
                        },)+
                    }
                }
            }
        )+
    };
}

config! {
    top: Top in "" {
        /// Directory of everything the server keeps: database, images, sandboxes, its secret. Made with mode 0700.
        /// Without it: `/var/lib/stacyvm` as root, `~/.local/share/stacyvm` otherwise.
        data_dir: Option<PathBuf> = "",
    }

    server: Server in "server." {
        /// Address to listen on. Anything but loopback needs a key (`stacyvm key create`, `auth.api_key`).
        host: String = "127.0.0.1",
        /// Port to listen on; 0 takes a free one.
        port: u16 = "7423",
        /// `Host` values to answer to besides loopback: `name`, `name:port` or `*.domain`.
        allowed_hosts: Vec<String> = "",
        /// Origins whose pages may call the API, such as `https://app.example.com`; `*` is any, and needs a key.
        cors_allowed_origins: Vec<String> = "",
        /// Domain below which ports of sandboxes are shown: `<port>-<sandbox>.<domain>`. With a port where browsers
        /// see another one than this server's. Empty shows none. Not of one site with the API's hosts.
        preview_domain: String = "localhost",
        /// How browsers see that domain when a proxy is in front, such as `https://preview.example.com`.
        preview_url: String = "",
        /// Port of its own where paths name previews, `/<sandbox>/<port>/`, for want of names. 0 takes a free one.
        preview_port: Option<u16> = "",
        /// Who shows previews: `builtin` is this server; with `traefik` containers of `docker` also carry labels for a
        /// Traefik that shows their port 3000 below `server.preview_domain`.
        preview_mode: PreviewMode = "builtin",
        /// PEM file of a certificate with its chain: TLS on every port of the server. Read again when it changes.
        tls_cert_file: Option<PathBuf> = "",
        /// PEM file of the certificate's key.
        tls_key_file: Option<PathBuf> = "",
        /// Addresses and networks of proxies in front, such as `10.0.0.0/8`: what they say in `X-Forwarded-For` is believed,
        /// and nobody else's.
        trusted_proxies: Vec<String> = "",
        /// Whether `/live`, `/health` and `/ready` answer without a key.
        public_probes: bool = "true",
        /// How long open requests may go on once a shutdown was asked for.
        shutdown_timeout: Duration = "10s",
    }

    acme: Acme in "server.acme." {
        /// Whether certificates come from a CA that speaks ACME, such as Let's Encrypt, instead of from files: the server
        /// orders and renews them itself. See docs/preview.md.
        enabled: bool = "false",
        /// Where the CA lists its addresses. Certificates and the account are kept apart for each.
        directory_url: String = "https://acme-v02.api.letsencrypt.org/directory",
        /// PEM file of the roots that the directory itself is trusted by, for a CA of your own. Without it: the system's.
        ca_file: Option<PathBuf> = "",
        /// Where the CA may write to.
        email: String = "",
        /// Whether you agree to the CA's terms of service.
        agree_terms: bool = "false",
        /// Names of the API to have a certificate for; `*.name` only with `server.acme.dns_hook`. Without it: the names
        /// in `server.allowed_hosts`.
        names: Vec<String> = "",
        /// Program that sets and removes a DNS record, called as `PROGRAM present|cleanup FQDN VALUE`. With it names are
        /// proven by DNS-01, and previews get the wildcard of `server.preview_domain`; without it by TLS-ALPN-01, for
        /// which the CA has to reach this server at port 443.
        dns_hook: Option<PathBuf> = "",
        /// Names of the server's own environment variables that the program gets, besides `PATH`: tokens of your DNS.
        dns_hook_env: Vec<String> = "",
        /// Longest time for one call of the program, which is then killed.
        dns_hook_timeout: Duration = "2m",
        /// Pause between the records and the CA's look at them, until all name servers have them.
        dns_wait: Duration = "10s",
        /// Id of an account that you have at the CA already (external account binding), for CAs that want one.
        eab_key_id: String = "",
        /// The key of that account, as the CA shows it: base64.
        eab_hmac_key: Option<Secret> = "",
        /// File that holds the key, instead of `server.acme.eab_hmac_key`.
        eab_hmac_key_file: Option<PathBuf> = "",
    }

    auth: Auth in "auth." {
        /// Whether callers need a key. Without it: whenever a key is set here, or one was ever made with
        /// `stacyvm key create`. With `true` a server without any key does not start; with `false` one with a valid key
        /// does not, because it would be open and look closed.
        enabled: Option<bool> = "",
        /// The key callers send as `X-API-Key`.
        api_key: Option<Secret> = "",
        /// File that holds the key, instead of `auth.api_key`.
        api_key_file: Option<PathBuf> = "",
        /// The key for administration, `X-Admin-API-Key`.
        admin_api_key: Option<Secret> = "",
        /// File that holds the admin key, instead of `auth.admin_api_key`.
        admin_api_key_file: Option<PathBuf> = "",
        /// Whether the API key also opens administration while there is no admin key.
        admin_fallback_enabled: bool = "true",
        /// Requests without a valid key that one address may make in a minute. More are answered 429, and configured keys
        /// of fewer than 32 characters do not work from there meanwhile. 0 is unlimited.
        failures_per_minute: u32 = "60",
        /// How long the audit log keeps calls; 0 is for ever. Changes are bounded by number too (a million), and so are
        /// refusals (100,000); administration is not.
        admin_audit_retention: Duration = "0s",
    }

    rate_limit: RateLimit in "rate_limit." {
        /// Whether callers may call only so often.
        enabled: bool = "false",
        /// Requests of one caller in a minute; 0 is unlimited.
        requests_per_minute: u32 = "120",
        /// Requests at once after a pause; 0 takes `rate_limit.requests_per_minute`.
        burst: u32 = "60",
        /// Whose requests count together: those for one `owner`, those with one `api_key`, those of one `ip`. The owner is
        /// the one a key is bound to, or whom a key set here or one with the scope `admin:*` names in `X-User-ID`;
        /// without one, the key counts.
        key_by: Option<RateLimitBy> = "owner",
        /// How long a caller that does not call is remembered.
        bucket_ttl: Duration = "15m",
        /// How often callers that do not call are looked for.
        cleanup_interval: Duration = "1m",
    }

    providers: Providers in "providers." {
        /// Provider of sandboxes that name none; enabled by being named here. `auto` takes the first that is enabled
        /// of `oci`, `docker`, `proot`, `custom`, `mock`.
        default: String = "auto",
        /// What happens to a sandbox that this server made and a runtime still has, but that the database does not
        /// know, as after restoring an old one: `remove` it, or `adopt` it without an owner until `defaults.ttl`.
        unknown_sandboxes: UnknownPolicy = "remove",
        /// How often what runtimes have is compared with the database. It is also done at start.
        reconcile_interval: Duration = "1m",
    }

    oci: Oci in "providers.oci." {
        /// Containers started by this program itself: no daemon.
        enabled: bool = "true",
        /// What starts sandboxes: `builtin` (this program), or an OCI runtime of the host such as `crun` or `runc`, as a
        /// name found on `PATH` or an absolute path. Sandboxes that run keep the one that started them.
        runtime: String = "builtin",
        /// Whether sandboxes can have the network `bridge`. Without it, and for an ordinary user, there is only `none`.
        bridge: bool = "true",
        /// Sandboxes with a network that are prepared ahead, so that a creation need not wait.
        prepared_bridge: usize = "16",
        /// Sandboxes without a network that are prepared ahead.
        prepared: usize = "4",
        /// Whether disks with a size may be loop file systems, where the data directory's file system has no project
        /// quota. Needs `/dev/loop-control` and e2fsprogs.
        loop_disks: bool = "true",
        /// Loop file systems that are prepared ahead: of `defaults.disk_size_mb`, or of the size asked for last.
        prepared_disks: usize = "4",
        /// Directories of the host that image `host` shows read-only besides `/usr`, such as `/opt`; listing
        /// `/usr/local` or `/usr/src` shows those instead of hiding them.
        host_include: Vec<String> = "",
        /// Directory of what all servers of this host have to agree on (user id ranges, network addresses).
        /// Without it: `/run/stacyvm` as root, `$XDG_RUNTIME_DIR/stacyvm` otherwise.
        run_dir: Option<PathBuf> = "",
        /// Name of our group in the host's control group hierarchies.
        cgroup_parent: String = "stacyvm",
    }

    docker: Docker in "providers.docker." {
        /// Containers of a Docker-compatible daemon.
        enabled: bool = "false",
        /// The daemon: a socket's path, `unix:///path` or `tcp://host:port`. Without it: `DOCKER_HOST`, else the context
        /// of `DOCKER_CONTEXT` or of docker's `config.json`, else `/var/run/docker.sock`.
        socket: String = "",
        /// Directory with `ca.pem`, `cert.pem` and `key.pem` for a daemon over TCP. Without it: `DOCKER_CERT_PATH` where
        /// `DOCKER_TLS_VERIFY` is set, or what the context has.
        tls_dir: Option<PathBuf> = "",
        /// Name under which the daemon knows the OCI runtime: `runc`, `crun`, `runsc` (gVisor), `kata-runtime`. Every
        /// sandbox is checked to run on it.
        runtime: String = "runc",
        /// Image of sandboxes here that name none. Without it: `defaults.image`.
        default_image: Option<String> = "",
        /// What the network `bridge` of a sandbox is: `bridge`, a network made with `docker network create`, `none`
        /// (sandboxes have no network), or `host`, which is no isolation and needs `auth.api_key`.
        network_mode: String = "bridge",
        /// System calls that are allowed: `default` (the daemon's), `unconfined`, or a file with a profile as JSON.
        seccomp_profile: String = "default",
        /// Whether only `/tmp`, `/workspace` and `providers.docker.tmpfs` can be written.
        read_only_rootfs: bool = "false",
        /// Memory limit of sandboxes here that ask for none, such as `512m`. Without it: `defaults.memory_mb`.
        memory: Option<MemorySize> = "",
        /// Processors of sandboxes here that ask for none, such as `0.5`. Without it: `defaults.vcpus`.
        cpus: Option<Processors> = "",
        /// Processes of sandboxes here that ask for no limit. Without it: `defaults.pids_limit`.
        pids_limit: Option<u64> = "",
        /// Who commands run as where nobody is asked for: a name or `uid:gid`. Without it: the image's user.
        user: Option<String> = "",
        /// Linux capabilities taken from commands, of those that Docker gives by default; `ALL` is all.
        dropped_caps: Vec<String> = "ALL",
        /// Linux capabilities that commands have all the same, such as `NET_RAW`.
        added_caps: Vec<String> = "",
        /// Mounts in memory, path to options: `/cache: size=64m`. As a variable `/cache:size=64m;/run`.
        tmpfs: BTreeMap<String, String> = "",
    }

    custom: Custom in "providers.custom." {
        /// Sandboxes of another service over HTTP, such as `stacyvm backend serve` on another machine.
        enabled: bool = "false",
        /// What the provider is called.
        name: String = "custom",
        /// Address of the service, such as `https://sandboxes.example.com`.
        base_url: String = "",
        /// The key of the service, sent as `X-API-Key`.
        api_key: Option<Secret> = "",
        /// File that holds the key, instead of `providers.custom.api_key`.
        api_key_file: Option<PathBuf> = "",
        /// Longest wait for an answer of the service, image pulls of a creation included. Streams have no limit.
        timeout: Duration = "60s",
    }

    proot: UnderProot in "providers.proot." {
        /// Sandboxes under PRoot, for hosts with no root, no KVM and no Docker; see docs/proot.md.
        enabled: bool = "false",
        /// Directory that is image `rootfs`; `stacyvm rootfs build` makes one. Other images come from the image store.
        rootfs_path: PathBuf = "/var/lib/stacyvm/rootfs",
        /// PRoot: a name to look for in `PATH`, or a path.
        proot_binary: PathBuf = "proot",
        /// Directory of sandboxes' files. Without it: below the data directory. As root, on a host without namespaces,
        /// everybody has to be able to pass through all directories above it.
        workspace_base: Option<PathBuf> = "",
        /// Sandboxes at once; 0 is unlimited.
        max_sandboxes: usize = "10",
        /// Largest memory limit that may be asked for, in MiB; larger defaults become it. 0 is unlimited.
        max_memory_mb: u64 = "512",
        /// The same for files, the image's included.
        max_disk_mb: u64 = "1024",
        /// Interpreters that should be in image `rootfs`: health says which are.
        languages: Vec<String> = "python3,node,bash",
        /// Whether sandboxes get processes, mounts and a network of their own where the kernel lets us. Without them they
        /// share the host's, and need a server with a key.
        namespaces: bool = "true",
    }

    mock: Mock in "providers.mock." {
        /// A fake for tests of clients. It imitates commands and isolates nothing.
        enabled: bool = "false",
    }

    images: Images in "images." {
        /// Size the image cache is kept below, in MiB, by dropping what was used longest ago.
        max_size_mb: u64 = "51200",
        /// Docker `config.json` with registry credentials. Without it: `~/.docker/config.json` where there is one.
        docker_config: Option<PathBuf> = "",
        /// `HOST[:PORT]` of registries to reach over plain HTTP, besides loopback.
        plain_http_registries: Vec<String> = "",
    }

    defaults: Defaults in "defaults." {
        /// Image of sandboxes that name none. `host` is the host's own `/usr`, read-only.
        image: String = "alpine:latest",
        /// Memory limit in MiB.
        memory_mb: u64 = "1024",
        /// Processors at most; fractions such as 0.5 are allowed.
        vcpus: f64 = "1",
        /// Processes and threads at most.
        pids_limit: u64 = "1024",
        /// Size of the writable disk in MiB; 0 takes whatever bound the runtime has (`oci`: 10 GiB where there are
        /// project quotas, else none).
        disk_size_mb: u64 = "0",
        /// What sandboxes may reach: `none` or `bridge`. Without it: `bridge` where the provider has a network.
        network: Option<String> = "",
        /// Life of a sandbox that asks for none.
        ttl: Duration = "30m",
        /// Longest life that may be asked for; 0 is unlimited.
        max_ttl: Duration = "24h",
        /// Deadline of commands that name none; 0 gives them the maximum.
        default_exec_timeout: Duration = "0s",
        /// Longest deadline of a command; 0 is unlimited.
        max_exec_timeout: Duration = "10m",
        /// Sandboxes at once; 0 is unlimited.
        max_sandboxes: u64 = "0",
        /// Sandboxes of one owner at once; 0 is unlimited.
        max_sandboxes_per_owner: u64 = "0",
        /// What happens to a create beyond those limits: `reject` it, or `queue` it until there is room.
        spawn_overflow: OverflowMode = "reject",
        /// Longest wait in the queue.
        spawn_queue_timeout: Duration = "30s",
        /// Creates that may wait at once.
        max_spawn_queue: usize = "100",
        /// Largest memory limit that may be asked for, in MiB; 0 is unlimited.
        max_memory_mb: u64 = "0",
        /// Most processors that may be asked for; 0 is unlimited.
        max_vcpus: f64 = "0",
        /// Largest disk that may be asked for, in MiB; 0 is unlimited.
        max_disk_size_mb: u64 = "0",
    }

    retention: Retention in "retention." {
        /// How long destroyed sandboxes stay in the listing by state.
        destroyed_sandboxes: Duration = "168h",
        /// How long finished commands stay in the exec log.
        exec_log: Duration = "168h",
        /// How long operations stay in the operation log.
        operation_log: Duration = "720h",
        /// Events that can be replayed.
        events: u64 = "100000",
    }

    database: Database in "database." {
        /// Kind of store. This version has `sqlite`.
        driver: DatabaseDriver = "sqlite",
        /// File of the store, relative to the data directory.
        path: PathBuf = "stacyvm.db",
    }

    logging: Logging in "logging." {
        /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,stacyvm_engine=debug`.
        level: String = "info",
        /// `json`, `pretty`, or `auto`: pretty on a terminal, JSON otherwise.
        format: LogFormat = "auto",
    }
}

choice! {
    OverflowMode { Reject = "reject", Queue = "queue" }
}

choice! {
    RateLimitBy { Owner = "owner", ApiKey = "api_key", Address = "ip" }
}

choice! {
    UnknownPolicy { Remove = "remove", Adopt = "adopt" }
}

choice! {
    PreviewMode { Builtin = "builtin", Traefik = "traefik" }
}

choice! {
    DatabaseDriver { Sqlite = "sqlite" }
}

choice! {
    LogFormat { Auto = "auto", Json = "json", Pretty = "pretty" }
}

/// Whether a setting of this name exists, with or without an effect.
pub(crate) fn find(key: &str) -> Option<&'static Entry> {
    entries().chain(RESERVED.iter().map(|reserved| &reserved.entry)).find(|entry| entry.key == key)
}

/// The kind of value a setting has.
pub(crate) fn shape_of(key: &str) -> Option<Shape> {
    find(key).map(|entry| entry.shape)
}

/// What a setting means, in one line.
pub(crate) fn meaning_of(key: &str) -> String {
    find(key).map(Entry::meaning).unwrap_or_default()
}

/// The default of a setting that may be without an effect here.
pub(crate) fn default_of(key: &str) -> &'static str {
    find(key).map_or("", |entry| entry.default)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn keys_and_their_environment_names_are_unique() {
        let all: Vec<_> = entries().chain(RESERVED.iter().map(|reserved| &reserved.entry)).collect();
        let keys: BTreeSet<_> = all.iter().map(|entry| entry.key).collect();
        let names: BTreeSet<_> = all.iter().map(|entry| entry.env_name()).collect();
        assert_eq!((keys.len(), names.len()), (all.len(), all.len()));
        assert!(names.contains("STACYVM_DEFAULTS_MAX_TTL"), "{names:?}");
    }

    #[test]
    fn every_setting_says_what_it_is_for() {
        for entry in entries() {
            let doc = entry.doc.concat();
            assert!(doc.trim().len() > 15 && doc.trim_end().ends_with('.'), "{}: {doc}", entry.key);
        }
    }
}
