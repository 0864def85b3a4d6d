//! Keeps `docs/cli.md` equal to what `--help` says.
//!
//! `UPDATE_DOCS=1 cargo test -p stacyvm commands::docs` writes it anew.

use std::fmt::Write as _;

use clap::CommandFactory as _;

use crate::commands::Cli;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
const BEGIN: &str = "<!-- commands:begin, written by `UPDATE_DOCS=1 cargo test -p stacyvm commands::docs` -->\n";
const END: &str = "<!-- commands:end -->\n";
const WIDTH: usize = 100;

#[test]
fn the_page_says_what_help_says() {
    let page = std::fs::read_to_string(PAGE).expect("docs/cli.md");
    let (before, rest) = page.split_once(BEGIN).expect("the page has a place for the commands");
    let (_, after) = rest.split_once(END).expect("the place on the page has an end");
    let fresh = format!("{before}{BEGIN}{}{END}{after}", commands());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(PAGE, &fresh).expect("docs/cli.md can be written");
        return;
    }
    assert!(page == fresh, "docs/cli.md is not what --help says: run the command named on the page");
}

fn commands() -> String {
    let mut root = Cli::command().term_width(WIDTH);
    root.build();
    let mut page = String::new();
    describe(&mut root, &mut page);
    page
}

fn describe(command: &mut clap::Command, page: &mut String) {
    let title = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let help = command.render_long_help().to_string();
    let lines: Vec<_> = help.lines().map(str::trim_end).collect();
    let _ = write!(page, "\n## {title}\n\n```text\n{}\n```\n", lines.join("\n").trim_end());
    let names: Vec<String> =
        command.get_subcommands().filter(|it| !it.is_hide_set()).map(|it| it.get_name().to_owned()).collect();
    for name in names {
        if let Some(nested) = command.find_subcommand_mut(&name) {
            describe(nested, page);
        }
    }
}
