//! The runtimes on this very host, with real namespaces and a real docker
//! daemon.

mod docker_conformance;
mod docker_fixture;
mod docker_images;
mod docker_lifecycle;
mod docker_runtimes;
mod docker_security;
mod dockerd;
mod fixture;
mod inside;
mod internet;
mod oci_conformance;
mod oci_lifecycle;
mod oci_network;
mod oci_restart;
