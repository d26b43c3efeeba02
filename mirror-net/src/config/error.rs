//! What is wrong with a cluster file, and where.

use std::ops::Range;

/// A mistake in a cluster file: always with its line, and its field where there is one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{path}: line {line}{}: {what}", self.field_text())]
pub struct ConfigError {
    /// The file, as the caller named it.
    pub path: String,
    /// Counted from 1.
    pub line: usize,
    /// Such as `node.disk.size`; empty for what is not TOML at all.
    pub field: String,
    /// What is wrong and what would be right.
    pub what: String,
}

impl ConfigError {
    fn field_text(&self) -> String {
        if self.field.is_empty() { String::new() } else { format!(": {}", self.field) }
    }

    /// An error at bytes `span` of `text`.
    pub(super) fn at(text: &str, path: &str, span: Range<usize>, field: &str, what: String) -> Self {
        let line =
            text.as_bytes()[..span.start.min(text.len())].iter().filter(|byte| **byte == b'\n').count();
        Self { path: path.to_owned(), line: line + 1, field: field.to_owned(), what }
    }

    /// From the TOML reader, whose messages name no field: it is read off the line.
    pub(super) fn from_toml(text: &str, path: &str, error: &toml::de::Error) -> Self {
        let span = error.span().unwrap_or(0..0);
        let start = text[..span.start.min(text.len())].rfind('\n').map_or(0, |newline| newline + 1);
        let line = text[start..].lines().next().unwrap_or_default();
        let field = line.split_once('=').map_or("", |(key, _)| key).trim();
        let field = field.trim_matches(['"', '\'']);
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let field = if field.chars().all(plain) { field } else { "" };
        let what = error.message().replace('\n', ", ");
        Self::at(text, path, span, field, what.trim_end_matches(", ").to_owned())
    }
}
