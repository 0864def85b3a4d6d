//! Finding paths by pattern: `*`, `?`, `[…]` within a name, `**` over directories.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::Failure;

/// Paths of one answer.
const MAX_MATCHES: usize = 100_000;

/// Directory entries looked at for one answer.
const MAX_VISITED: usize = 2_000_000;

/// Directory levels, against loops of bind mounts.
const MAX_DEPTH: usize = 256;

/// Paths that match an absolute pattern, in order. Links are named but not
/// followed by `**`. Names that begin with a dot are matched like others.
pub(crate) fn find(pattern: &str) -> Result<Vec<String>, Failure> {
    let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty()).collect();
    let mut search = Search { matches: BTreeSet::new(), visited: 0 };
    search.descend(Path::new("/"), &parts, 0)?;
    Ok(search.matches.into_iter().map(|path| path.to_string_lossy().into_owned()).collect())
}

struct Search {
    matches: BTreeSet<PathBuf>,
    visited: usize,
}

impl Search {
    fn descend(&mut self, dir: &Path, parts: &[&str], depth: usize) -> Result<(), Failure> {
        let Some((&part, rest)) = parts.split_first() else { return Ok(()) };
        if depth > MAX_DEPTH {
            return Ok(());
        }
        if part == "**" {
            // Zero directories, then one more and the same again.
            if rest.is_empty() {
                self.found(dir.to_owned())?;
            }
            self.descend(dir, rest, depth)?;
            for (path, is_dir) in self.entries(dir)? {
                if is_dir {
                    self.descend(&path, parts, depth + 1)?;
                } else if rest.is_empty() {
                    self.found(path)?;
                }
            }
            return Ok(());
        }
        if !part.contains(['*', '?', '[', '\\']) {
            let path = dir.join(part);
            return if rest.is_empty() {
                if path.symlink_metadata().is_ok() { self.found(path) } else { Ok(()) }
            } else {
                self.descend(&path, rest, depth + 1)
            };
        }
        for (path, _) in self.entries(dir)? {
            let matched = path.file_name().is_some_and(|name| matches_name(part, &name.to_string_lossy()));
            if matched && rest.is_empty() {
                self.found(path)?;
            } else if matched {
                self.descend(&path, rest, depth + 1)?;
            }
        }
        Ok(())
    }

    /// What cannot be read has no entries.
    fn entries(&mut self, dir: &Path) -> Result<Vec<(PathBuf, bool)>, Failure> {
        let mut entries = Vec::new();
        for found in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            self.visited += 1;
            if self.visited > MAX_VISITED {
                return Err(Failure::Busy("the pattern covers too many files: make it narrower".to_owned()));
            }
            entries.push((found.path(), found.file_type().is_ok_and(|kind| kind.is_dir())));
        }
        Ok(entries)
    }

    fn found(&mut self, path: PathBuf) -> Result<(), Failure> {
        self.matches.insert(path);
        if self.matches.len() > MAX_MATCHES {
            return Err(Failure::Busy(format!("more than {MAX_MATCHES} paths match: make the pattern narrower")));
        }
        Ok(())
    }
}

/// Matches one name; linear in practice and quadratic at worst, whatever the
/// pattern.
fn matches_name(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    let (mut at, mut from) = (0, 0);
    // Where to go on when the last star has to take one character more.
    let mut retry: Option<(usize, usize)> = None;
    while from < name.len() {
        if pattern.get(at) == Some(&'*') {
            retry = Some((at + 1, from));
            at += 1;
            continue;
        }
        if let Some(next) = match_one(&pattern, at, name[from]) {
            at = next;
            from += 1;
            continue;
        }
        let Some((after_star, taken)) = retry else { return false };
        at = after_star;
        from = taken + 1;
        retry = Some((after_star, from));
    }
    pattern[at.min(pattern.len())..].iter().all(|&rest| rest == '*')
}

/// The pattern position after one matched character.
fn match_one(pattern: &[char], at: usize, character: char) -> Option<usize> {
    match *pattern.get(at)? {
        '?' => Some(at + 1),
        '\\' => (*pattern.get(at + 1)? == character).then_some(at + 2),
        '[' => match_set(pattern, at, character),
        literal => (literal == character).then_some(at + 1),
    }
}

/// `[abc]`, `[a-z]`, `[!a]`; a bracket that is not closed is itself.
fn match_set(pattern: &[char], at: usize, character: char) -> Option<usize> {
    let negated = matches!(pattern.get(at + 1), Some('!' | '^'));
    let first = at + 1 + usize::from(negated);
    // A closing bracket in first place is a member.
    let Some(length) = pattern.get(first + 1..).and_then(|rest| rest.iter().position(|&c| c == ']')) else {
        return (character == '[').then_some(at + 1);
    };
    let end = first + 1 + length;
    let set = &pattern[first..end];
    let mut inside = false;
    let mut index = 0;
    while index < set.len() {
        if let (Some('-'), Some(&last)) = (set.get(index + 1), set.get(index + 2)) {
            inside |= (set[index]..=last).contains(&character);
            index += 3;
        } else {
            inside |= set[index] == character;
            index += 1;
        }
    }
    (inside != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_as_in_a_shell() {
        for (pattern, name, expected) in [
            ("*", "a.txt", true),
            ("*.txt", "a.txt", true),
            ("*.txt", "a.txt2", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]]", "]", true),
            ("[x", "[x", true),
            (r"\*", "*", true),
            (r"\*", "a", false),
            ("*a*b*c*", "xxaxxbxxcxx", true),
            ("日*", "日本", true),
            ("", "", true),
        ] {
            assert_eq!(matches_name(pattern, name), expected, "{pattern} against {name}");
        }
    }

    #[test]
    fn a_hostile_pattern_ends() {
        assert!(!matches_name(&format!("{}z", "*a".repeat(100)), &"a".repeat(255)));
    }

    #[test]
    fn directories_are_searched() {
        let root = tempfile::tempdir().expect("a temporary directory");
        for file in ["a/1.txt", "a/b/2.txt", "a/b/c/3.md", "top.txt"] {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().expect("below the root")).expect("new directories");
            std::fs::write(path, b"").expect("a new file");
        }
        let find = |pattern: &str| {
            let base = root.path().to_string_lossy().into_owned();
            let found = find(&format!("{base}/{pattern}")).expect("a small tree");
            found.into_iter().map(|path| path[base.len() + 1..].to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(find("**/*.txt"), ["a/1.txt", "a/b/2.txt", "top.txt"]);
        assert_eq!(find("a/*"), ["a/1.txt", "a/b"]);
        assert_eq!(find("a/**/c/*"), ["a/b/c/3.md"]);
        assert_eq!(find("none/*"), [""; 0]);
    }
}
