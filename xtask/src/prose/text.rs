//! Separates prose from code.

/// Returns the comments and string literals of Rust source, without the code spans in comments.
pub(super) fn of_rust(source: &str) -> String {
    let mut prose = String::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '/' if rest.starts_with("//") => {
                let length = rest.find('\n').unwrap_or(rest.len());
                prose.push_str(&without_spans(&rest[..length]));
                prose.push('\n');
                length
            }
            '/' if rest.starts_with("/*") => {
                let length = block_comment(rest);
                prose.push_str(&without_spans(&rest[..length]));
                prose.push('\n');
                length
            }
            '"' => {
                let length = quoted(rest);
                prose.push_str(&unescaped(&rest[..length]));
                prose.push('\n');
                length
            }
            '\'' => character(rest),
            'r' if raw_string(rest).is_some() => {
                let length = raw_string(rest).unwrap_or(1);
                prose.push_str(&rest[..length]);
                prose.push('\n');
                length
            }
            c if c.is_alphanumeric() || c == '_' => identifier(rest),
            c => c.len_utf8(),
        };
        rest = &rest[length..];
    }
    prose
}

/// Returns Markdown without code blocks and code spans.
pub(super) fn of_markdown(source: &str) -> String {
    let mut prose = String::new();
    let mut fence: Option<&str> = None;
    for line in source.lines() {
        let trimmed = line.trim_start();
        let marker = ["```", "~~~"].into_iter().find(|marker| trimmed.starts_with(marker));
        match (fence, marker) {
            (Some(open), Some(marker)) if open == marker => fence = None,
            (Some(_), _) => {}
            (None, Some(marker)) => fence = Some(marker),
            (None, None) => {
                prose.push_str(line);
                prose.push('\n');
            }
        }
    }
    without_spans(&prose)
}

/// Replaces each `code span` by one space. An unpaired backtick hides nothing.
fn without_spans(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('`') {
        kept.push_str(before);
        // A span that crosses a blank line is two unpaired backticks.
        match after.split_once('`') {
            Some((code, behind)) if !code.contains("\n\n") => {
                kept.push(' ');
                rest = behind;
            }
            _ => rest = after,
        }
    }
    kept + rest
}

/// Returns the length of the comment that begins with `/*`; block comments nest.
fn block_comment(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// Returns the length of the string literal that begins with `"`.
fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Returns the length of the raw string (`r"…"`, `r#"…"#`) or raw identifier at the start, if there is one.
fn raw_string(text: &str) -> Option<usize> {
    let hashes = text[1..].chars().take_while(|c| *c == '#').count();
    let content = text[1 + hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = content.find(&end).map_or(content.len(), |at| at + end.len());
    Some(1 + hashes + 1 + length)
}

/// Returns the length of an identifier or number, with the prefix of a raw or byte string (`br"…"`) left to the caller.
fn identifier(text: &str) -> usize {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    match &text[..end] {
        // The string that follows the prefix is read next.
        "br" | "cr" => 1,
        _ => end,
    }
}

/// Returns the length of a character literal, or 1 for the tick of a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            // The escaped character may be a tick.
            chars.next();
            chars.find(|(_, c)| *c == '\'').map_or(text.len(), |(at, _)| at + 1)
        }
        Some((_, _)) => match chars.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

/// Replaces escapes by spaces, so that `\n` does not glue its letter to the next word.
fn unescaped(literal: &str) -> String {
    let mut text = String::new();
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        if c == '\\' {
            chars.next();
            text.push(' ');
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(prose: &str) -> Vec<&str> {
        prose.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect()
    }

    #[test]
    fn comments_and_strings_are_prose_and_code_is_not() {
        let source = "/// one `two`\nfn three() { four(\"five\\nsix\", 'x', '\\'', b\"seven\"); } // eight\n";
        assert_eq!(words(&of_rust(source)), ["one", "five", "six", "seven", "eight"]);
    }

    #[test]
    fn raw_strings_end_at_their_own_hashes() {
        let source = r####"let a = r#"one "two" // three"#; let b = br"four"; let r = four; r#type();"####;
        assert_eq!(words(&of_rust(source)), ["r", "one", "two", "three", "r", "four"]);
    }

    #[test]
    fn block_comments_nest_and_lifetimes_open_no_literal() {
        let source = "/* one /* two */ three */ fn f<'a>(x: &'a str) -> char { '\"' } // four";
        assert_eq!(words(&of_rust(source)), ["one", "two", "three", "four"]);
    }

    #[test]
    fn code_in_markdown_is_not_prose() {
        let source = "one `two` three\n```console\nfour\n```\nfive\n~~~\n```\nsix\n~~~\nseven ` eight\n";
        assert_eq!(words(&of_markdown(source)), ["one", "three", "five", "seven", "eight"]);
    }
}
