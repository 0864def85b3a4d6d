//! The runtimes on this very host, with real namespaces and a real docker
//! daemon.

mod custom_conformance;
mod custom_faults;
mod docker_conformance;
mod docker_fixture;
mod docker_images;
mod docker_lifecycle;
mod docker_network;
mod docker_registry;
mod docker_runtimes;
mod docker_security;
#[expect(dead_code, reason = "shared with the tests of the program, which kill it")]
mod dockerd;
mod fixture;
mod guest_kernel;
mod inside;
mod internet;
mod oci_conformance;
mod oci_data_dir;
mod oci_disk;
mod oci_disk_quota;
mod oci_lifecycle;
mod oci_network;
mod oci_restart;
mod oci_rootless;
mod oci_runtimes;
mod ordinary_user;
mod proot_conformance;
mod proot_escape;
mod proot_fixture;
mod proot_lifecycle;
mod proot_limits;
