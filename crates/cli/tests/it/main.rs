//! The program as people use it: started, asked, killed, and started again,
//! with real sandboxes on this very host.

mod architecture;
mod backend;
mod commands;
mod custom;
mod docker;
mod docs;
mod full_disk;
mod hostile;
mod leaks;
mod operator_certify;
mod operator_config;
mod operator_container;
mod operator_db;
mod operator_doctor;
mod operator_packaging;
mod operator_smoke;
mod operator_support;
mod operator_upgrade;
mod proot;
mod restart;
mod runtimes;
mod serve;
mod support;
