//! The program as people use it: started, asked, killed, and started again,
//! with real sandboxes on this very host.

mod operator_config;
mod operator_db;
mod operator_doctor;
mod operator_smoke;
mod operator_support;
mod operator_upgrade;
mod support;
