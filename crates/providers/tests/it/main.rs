//! The runtimes on this very host, with real namespaces.

mod fixture;
mod internet;
mod oci_conformance;
mod oci_lifecycle;
mod oci_network;
mod oci_restart;
