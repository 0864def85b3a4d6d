//! The runtimes on this very host, with real namespaces.

mod fixture;
mod guest_kernel;
mod internet;
mod oci_conformance;
mod oci_disk;
mod oci_disk_quota;
mod oci_lifecycle;
mod oci_network;
mod oci_restart;
mod oci_rootless;
mod oci_runtimes;
mod ordinary_user;
