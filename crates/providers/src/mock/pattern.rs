//! Glob patterns: `*`, `?`, `[…]` within a component, `**` for any number of
//! components.

use stacyvm_sandbox::SessionError;

/// Longest pattern; also bounds the work of matching.
const PATTERN_MAX_BYTES: usize = 4096;

pub(super) struct Pattern(Vec<String>);

impl Pattern {
    pub(super) fn parse(text: &str) -> Result<Self, SessionError> {
        if text.trim().is_empty() || text.len() > PATTERN_MAX_BYTES || text.contains('\0') {
            return Err(SessionError::InvalidArgument("a pattern is required, of at most 4096 bytes".to_owned()));
        }
        let text = if text.starts_with('/') { text.to_owned() } else { format!("/workspace/{text}") };
        Ok(Self(components(&text).map(str::to_owned).collect()))
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        let path: Vec<&str> = components(path).collect();
        // Row by row over the pattern: which prefixes of the path match so far.
        let mut reached = vec![false; path.len() + 1];
        reached[0] = true;
        for component in &self.0 {
            let mut next = vec![false; path.len() + 1];
            if component == "**" {
                let mut any = false;
                for (index, at) in reached.iter().enumerate() {
                    any |= at;
                    next[index] = any;
                }
            } else {
                for (index, name) in path.iter().enumerate() {
                    next[index + 1] = reached[index] && name_matches(component, name);
                }
            }
            reached = next;
        }
        reached[path.len()] && !path.is_empty()
    }
}

fn components(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|component| !component.is_empty())
}

fn name_matches(pattern: &str, name: &str) -> bool {
    // As in a shell, a leading dot must be named.
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    let mut at = 0;
    while at < pattern.len() {
        let mut next = vec![false; name.len() + 1];
        if pattern[at] == '*' {
            let mut any = false;
            for (index, here) in reached.iter().enumerate() {
                any |= here;
                next[index] = any;
            }
            at += 1;
        } else {
            let (accepts, length) = one(&pattern[at..]);
            for (index, c) in name.iter().enumerate() {
                next[index + 1] = reached[index] && accepts(*c);
            }
            at += length;
        }
        reached = next;
    }
    reached[name.len()]
}

/// What the next one-character element accepts, and its length.
fn one(pattern: &[char]) -> (Box<dyn Fn(char) -> bool + '_>, usize) {
    if pattern[0] == '?' {
        return (Box::new(|_| true), 1);
    }
    let close = pattern.iter().skip(2).position(|c| *c == ']').map(|at| at + 2);
    if let ('[', Some(close)) = (pattern[0], close) {
        let negated = matches!(pattern[1], '!' | '^');
        let set = &pattern[1 + usize::from(negated)..close];
        let accepts = move |c: char| {
            let ranged = set.windows(3).any(|range| range[1] == '-' && (range[0]..=range[2]).contains(&c));
            (ranged || set.contains(&c)) != negated
        };
        return (Box::new(accepts), close + 1);
    }
    let literal = pattern[0];
    (Box::new(move |c| c == literal), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_paths() {
        let check = |pattern: &str, path: &str| Pattern::parse(pattern).unwrap().matches(path);
        assert!(check("/workspace/*.py", "/workspace/a.py"));
        assert!(!check("/workspace/*.py", "/workspace/d/a.py"));
        assert!(check("/workspace/**/*.py", "/workspace/d/e/a.py"));
        assert!(check("/workspace/**/*.py", "/workspace/a.py"));
        assert!(check("/**", "/etc/os-release"));
        assert!(check("/tmp/[a-c]?.tx[!u]", "/tmp/bz.txt"));
        assert!(!check("/tmp/[a-c]?.txt", "/tmp/dz.txt"));
        assert!(!check("/tmp/*", "/tmp/.hidden"));
        assert!(check("/tmp/.*", "/tmp/.hidden"));
        assert!(check("*.txt", "/workspace/a.txt"));
        assert!(check("/tmp/a[b", "/tmp/a[b"));
        assert!(!check("/tmp/\u{e9}", "/tmp/e"));
    }
}
