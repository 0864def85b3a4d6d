//! The `stacyvm` program: the server, and the commands that talk to one.
//!
//! The only place that names concrete providers and that reads the environment,
//! the home directory and the terminal. What a command does lives in a file of
//! its name below `commands`.

mod agent;
mod check;
mod commands;
mod config;
mod data_dir;
mod failure;
mod lifeline;
mod output;
mod private_file;
mod terminal;

use std::process::ExitCode;

use clap::Parser as _;

use crate::commands::Cli;
use crate::failure::Report;
use crate::output::Form;

fn main() -> ExitCode {
    // Before any thread exists: the spawner forks.
    if std::env::args_os().nth(1).is_some_and(|name| name == agent::SPAWNER_COMMAND) {
        agent::spawner();
    }
    if std::env::args_os().nth(1).is_some_and(|name| name == agent::LAUNCHER_COMMAND) {
        agent::launcher();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return commands::usage::report(error),
    };
    let form = cli.form();
    let runtime = match cli.runtime() {
        Ok(runtime) => runtime,
        Err(error) => return report(&error.into(), form),
    };
    let result = runtime.block_on(cli.run());
    // A read of standard input may still wait for a key that nobody presses.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => report(&error, form),
    }
}

fn report(error: &anyhow::Error, form: Form) -> ExitCode {
    Report::new(error).print(form);
    failure::exit_code(error)
}
