//! Keys of published configurations whose features this version does not have.
//!
//! They are known, so that an existing file can be used as it is. One that is
//! set to anything but its default is reported: as a warning where the feature
//! is merely absent, as an error where leaving it out would weaken what the
//! file asks for.

use crate::config::schema::Entry;
use crate::config::setting::Shape;

/// A key without an effect.
#[derive(Debug)]
pub(crate) struct Reserved {
    pub(crate) entry: Entry,
    pub(crate) absence: Absence,
}

/// How much it matters that a feature is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Absence {
    /// Sandboxes run the same; something else is missing.
    Harmless,
    /// The file asks for protection that would not be there.
    Refused,
}

const fn harmless(key: &'static str, shape: Shape, default: &'static str) -> Reserved {
    Reserved { entry: entry(key, shape, default), absence: Absence::Harmless }
}

const fn refused(key: &'static str, shape: Shape, default: &'static str) -> Reserved {
    Reserved { entry: entry(key, shape, default), absence: Absence::Refused }
}

const fn entry(key: &'static str, shape: Shape, default: &'static str) -> Entry {
    Entry { key, shape, default, doc: &[] }
}

/// Sorted by section, as in control-plane 3.2.
pub(crate) const RESERVED: &[Reserved] = &[
    harmless("worker.id", Shape::Text, ""),
    harmless("worker.control_plane_url", Shape::Text, "http://localhost:7423"),
    harmless("worker.listen_addr", Shape::Text, ""),
    harmless("worker.preview_domain", Shape::Text, ""),
    harmless("worker.heartbeat_interval", Shape::Duration, "30s"),
    harmless("worker.shutdown_timeout", Shape::Duration, "10s"),
    harmless("worker.rpc_tls.enabled", Shape::Switch, "false"),
    harmless("worker.rpc_tls.server_cert_file", Shape::Text, ""),
    harmless("worker.rpc_tls.server_key_file", Shape::Text, ""),
    harmless("worker.rpc_tls.client_ca_file", Shape::Text, ""),
    harmless("worker.rpc_tls.ca_file", Shape::Text, ""),
    harmless("worker.rpc_tls.client_cert_file", Shape::Text, ""),
    harmless("worker.rpc_tls.client_key_file", Shape::Text, ""),
    harmless("worker.rpc_tls.server_name", Shape::Text, ""),
    harmless("worker.rpc_tls.insecure_skip_verify", Shape::Switch, "false"),
    harmless("providers.firecracker.enabled", Shape::Switch, "false"),
    harmless("providers.firecracker.firecracker_path", Shape::Text, "/usr/local/bin/firecracker"),
    harmless("providers.firecracker.kernel_path", Shape::Text, "/var/lib/stacyvm/vmlinux.bin"),
    harmless("providers.firecracker.default_rootfs", Shape::Text, ""),
    harmless("providers.firecracker.agent_path", Shape::Text, "./bin/stacyvm-agent"),
    harmless("providers.firecracker.data_dir", Shape::Text, "/var/lib/stacyvm"),
    harmless("providers.docker.pool_security.per_user_uid", Shape::Switch, "false"),
    harmless("providers.docker.pool_security.pid_namespace", Shape::Switch, "false"),
    harmless("providers.docker.pool_security.hidepid", Shape::Switch, "false"),
    harmless("providers.docker.pool_security.workspace_permissions", Shape::Switch, "true"),
    harmless("providers.e2b.enabled", Shape::Switch, "false"),
    harmless("providers.e2b.api_key", Shape::Secret, ""),
    harmless("providers.e2b.base_url", Shape::Text, "https://api.e2b.dev"),
    harmless("providers.proot.default_timeout", Shape::Duration, "60s"),
    harmless("defaults.pool_size", Shape::Number, "0"),
    harmless("defaults.pool_template", Shape::Text, ""),
    harmless("auth.worker_token", Shape::Secret, ""),
    harmless("auth.worker_token_file", Shape::Text, ""),
    harmless("auth.worker_tokens", Shape::Secrets, ""),
    harmless("auth.worker_signing_key", Shape::Secret, ""),
    harmless("auth.worker_signing_key_file", Shape::Text, ""),
    harmless("auth.worker_signing_keys", Shape::Secrets, ""),
    harmless("auth.worker_revoked_token_ids", Shape::List, ""),
    refused("auth.oidc_enabled", Shape::Switch, "false"),
    refused("auth.oidc_issuer", Shape::Text, ""),
    refused("auth.oidc_audience", Shape::Text, ""),
    refused("auth.oidc_jwks_url", Shape::Text, ""),
    refused("auth.oidc_public_key", Shape::Text, ""),
    refused("auth.oidc_public_key_file", Shape::Text, ""),
    harmless("auth.oidc_groups_claim", Shape::Text, "groups"),
    harmless("auth.oidc_tenant_claim", Shape::Text, "tenant_id"),
    refused("auth.oidc_admin_groups", Shape::List, ""),
    refused("auth.oidc_operator_groups", Shape::List, ""),
    refused("auth.oidc_viewer_groups", Shape::List, ""),
    harmless("database.dsn", Shape::Secret, ""),
    refused("pool.enabled", Shape::Switch, "false"),
    harmless("pool.max_vms", Shape::Number, "10"),
    harmless("pool.max_users_per_vm", Shape::Number, "5"),
    harmless("pool.image", Shape::Text, "alpine:latest"),
    harmless("pool.memory_mb", Shape::Number, "2048"),
    harmless("pool.vcpus", Shape::Number, "2"),
    harmless("pool.overflow", Shape::Text, "reject"),
];
