//! The part of shell syntax that the mock understands: lists with `;`, `&`,
//! `&&`, `||` and newlines, pipelines, subshells, redirections, assignments,
//! quoting, `$NAME`, `${NAME}`, `$?`, `$$` and `$(…)`.

/// Deepest nesting of subshells and substitutions.
const DEPTH_MAX: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct List(pub(super) Vec<(Pipeline, Separator)>);

/// What stands behind a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Separator {
    Sequence,
    And,
    Or,
    Background,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pipeline(pub(super) Vec<Command>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) body: Body,
    pub(super) redirects: Vec<Redirect>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    Simple { assignments: Vec<(String, Word)>, words: Vec<Word> },
    Subshell(List),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Redirect {
    /// 0, 1 or 2.
    pub(super) from: u32,
    pub(super) to: Target,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    Read(Word),
    Write(Word),
    Append(Word),
    Copy(u32),
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) parts: Vec<Part>,
    /// Something in it was quoted, so that it stays even when empty.
    pub(super) quoted: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    Variable(String),
    Substitution(List),
}

/// Reads a script; the error is the shell's message.
pub(super) fn parse(text: &str) -> Result<List, String> {
    let mut parser = Parser { chars: text.chars().collect(), at: 0, depth: 0 };
    let list = parser.list()?;
    match parser.peek() {
        None => Ok(list),
        Some(unexpected) => Err(syntax(unexpected)),
    }
}

struct Parser {
    chars: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn list(&mut self) -> Result<List, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err("sh: nested too deeply".to_owned());
        }
        let mut items = Vec::new();
        loop {
            self.skip_blank(true);
            if matches!(self.peek(), None | Some(')')) {
                break;
            }
            let pipeline = self.pipeline()?;
            let separator = self.separator()?;
            items.push((pipeline, separator));
        }
        self.depth -= 1;
        Ok(List(items))
    }

    fn separator(&mut self) -> Result<Separator, String> {
        self.skip_blank(false);
        let separator = match (self.peek(), self.peek_at(1)) {
            (Some('&'), Some('&')) => {
                self.at += 2;
                Separator::And
            }
            (Some('|'), Some('|')) => {
                self.at += 2;
                Separator::Or
            }
            (Some('&'), _) => {
                self.at += 1;
                Separator::Background
            }
            (Some(';' | '\n'), _) => {
                self.at += 1;
                Separator::Sequence
            }
            (None | Some(')'), _) => Separator::Sequence,
            (Some(unexpected), _) => return Err(syntax(unexpected)),
        };
        if matches!(separator, Separator::And | Separator::Or) {
            self.skip_blank(true);
            if matches!(self.peek(), None | Some(')' | ';' | '&' | '|')) {
                return Err(syntax(self.peek().unwrap_or('\n')));
            }
        }
        Ok(separator)
    }

    fn pipeline(&mut self) -> Result<Pipeline, String> {
        let mut commands = vec![self.command()?];
        loop {
            self.skip_blank(false);
            if self.peek() != Some('|') || self.peek_at(1) == Some('|') {
                return Ok(Pipeline(commands));
            }
            self.at += 1;
            self.skip_blank(true);
            commands.push(self.command()?);
        }
    }

    fn command(&mut self) -> Result<Command, String> {
        let mut redirects = Vec::new();
        if self.peek() == Some('(') {
            self.at += 1;
            let list = self.list()?;
            if self.peek() != Some(')') {
                return Err(syntax('\n'));
            }
            self.at += 1;
            self.skip_blank(false);
            while let Some(redirect) = self.redirect()? {
                redirects.push(redirect);
                self.skip_blank(false);
            }
            return Ok(Command { body: Body::Subshell(list), redirects });
        }
        let (mut assignments, mut words) = (Vec::new(), Vec::new());
        loop {
            self.skip_blank(false);
            if let Some(redirect) = self.redirect()? {
                redirects.push(redirect);
                continue;
            }
            match self.peek() {
                None | Some(';' | '&' | '|' | '\n' | ')') => break,
                Some('(') => return Err(syntax('(')),
                Some(_) => {}
            }
            if words.is_empty()
                && let Some(name) = self.assignment_name()
            {
                assignments.push((name, self.word()?));
                continue;
            }
            words.push(self.word()?);
        }
        if words.is_empty() && assignments.is_empty() && redirects.is_empty() {
            return Err(syntax(self.peek().unwrap_or('\n')));
        }
        Ok(Command { body: Body::Simple { assignments, words }, redirects })
    }

    /// Takes `NAME=` if that is what comes next.
    fn assignment_name(&mut self) -> Option<String> {
        let rest = &self.chars[self.at..];
        let length = rest.iter().take_while(|c| c.is_ascii_alphanumeric() || **c == '_').count();
        if length == 0 || rest[0].is_ascii_digit() || rest.get(length) != Some(&'=') {
            return None;
        }
        self.at += length + 1;
        Some(rest_to_string(&self.chars[self.at - length - 1..self.at - 1]))
    }

    fn redirect(&mut self) -> Result<Option<Redirect>, String> {
        let (digit, skip) = match (self.peek(), self.peek_at(1)) {
            (Some(digit @ ('0' | '1' | '2')), Some('<' | '>')) => (digit.to_digit(10), 1),
            (Some('<' | '>'), _) => (None, 0),
            _ => return Ok(None),
        };
        self.at += skip;
        let reads = self.peek() == Some('<');
        self.at += 1;
        let from = digit.unwrap_or(u32::from(!reads));
        let to = if reads {
            self.skip_blank(false);
            Target::Read(self.word()?)
        } else if self.peek() == Some('&') {
            let to = self.peek_at(1).and_then(|c| c.to_digit(10)).filter(|to| *to <= 2).ok_or_else(|| syntax('&'))?;
            self.at += 2;
            Target::Copy(to)
        } else if self.peek() == Some('>') {
            self.at += 1;
            self.skip_blank(false);
            Target::Append(self.word()?)
        } else {
            self.skip_blank(false);
            Target::Write(self.word()?)
        };
        Ok(Some(Redirect { from, to }))
    }

    fn word(&mut self) -> Result<Word, String> {
        let mut word = Word::default();
        loop {
            match self.peek() {
                None | Some(' ' | '\t' | '\n' | ';' | '&' | '|' | '(' | ')' | '<' | '>') => return Ok(word),
                Some('\'') => {
                    self.at += 1;
                    word.quoted = true;
                    let length = self.chars[self.at..].iter().position(|c| *c == '\'').ok_or_else(unterminated)?;
                    word.push(&rest_to_string(&self.chars[self.at..self.at + length]));
                    self.at += length + 1;
                }
                Some('"') => {
                    self.at += 1;
                    word.quoted = true;
                    self.double_quoted(&mut word)?;
                }
                Some('\\') => {
                    self.at += 1;
                    if let Some(escaped) = self.next() {
                        word.quoted = true;
                        word.push(&escaped.to_string());
                    }
                }
                Some('$') => self.dollar(&mut word)?,
                Some(plain) => {
                    self.at += 1;
                    word.push(&plain.to_string());
                }
            }
        }
    }

    fn double_quoted(&mut self, word: &mut Word) -> Result<(), String> {
        loop {
            match self.peek().ok_or_else(unterminated)? {
                '"' => {
                    self.at += 1;
                    return Ok(());
                }
                '$' => self.dollar(word)?,
                '\\' if matches!(self.peek_at(1), Some('"' | '\\' | '$' | '`')) => {
                    word.push(&self.chars[self.at + 1].to_string());
                    self.at += 2;
                }
                plain => {
                    self.at += 1;
                    word.push(&plain.to_string());
                }
            }
        }
    }

    fn dollar(&mut self, word: &mut Word) -> Result<(), String> {
        self.at += 1;
        let braces = self.peek() == Some('{');
        if self.peek() == Some('(') {
            self.at += 1;
            let list = self.list()?;
            if self.next() != Some(')') {
                return Err(unterminated());
            }
            word.parts.push(Part::Substitution(list));
            return Ok(());
        }
        self.at += usize::from(braces);
        let name = if let Some(special @ ('?' | '$')) = self.peek() {
            self.at += 1;
            special.to_string()
        } else {
            let rest = &self.chars[self.at..];
            let length = rest.iter().take_while(|c| c.is_ascii_alphanumeric() || **c == '_').count();
            self.at += length;
            rest_to_string(&self.chars[self.at - length..self.at])
        };
        if braces && self.next() != Some('}') {
            return Err("sh: bad substitution".to_owned());
        }
        if name.is_empty() {
            word.push("$");
        } else {
            word.parts.push(Part::Variable(name));
        }
        Ok(())
    }

    fn skip_blank(&mut self, newlines: bool) {
        while let Some(c) = self.peek() {
            let comment = c == '#' && (self.at == 0 || matches!(self.chars[self.at - 1], ' ' | '\t' | '\n' | ';'));
            if comment {
                while self.peek().is_some_and(|c| c != '\n') {
                    self.at += 1;
                }
            } else if matches!(c, ' ' | '\t') || (newlines && c == '\n') {
                self.at += 1;
            } else {
                return;
            }
        }
    }

    fn peek(&self) -> Option<char> {
        self.peek_at(0)
    }

    fn peek_at(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += 1;
        Some(next)
    }
}

impl Word {
    fn push(&mut self, text: &str) {
        if let Some(Part::Text(last)) = self.parts.last_mut() {
            last.push_str(text);
        } else {
            self.parts.push(Part::Text(text.to_owned()));
        }
    }
}

fn rest_to_string(chars: &[char]) -> String {
    chars.iter().collect()
}

fn syntax(unexpected: char) -> String {
    let shown = if unexpected == '\n' { "newline".to_owned() } else { unexpected.to_string() };
    format!("sh: syntax error: unexpected \"{shown}\"")
}

fn unterminated() -> String {
    "sh: syntax error: unterminated quoted string".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_script_is_a_syntax_error() {
        for text in ["'open", "\"open", "a &&", "| a", "(a", "a )", ";", "echo $(x", "${a", "a >&9"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        for text in ["", "  # only a comment", "a; b & c\nd", "a && b || c", "(a; b) > f", "x=1 y='2 3' cmd", "a 2>&1"]
        {
            assert!(parse(text).is_ok(), "{text:?} {:?}", parse(text));
        }
        let deep = "(".repeat(1000);
        assert!(parse(&deep).is_err());
    }
}
