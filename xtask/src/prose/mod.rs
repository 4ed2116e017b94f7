//! Checks of the prose: words in comments, strings and Markdown, commit subjects, and paths that documents name.

mod paths;
mod subjects;
mod text;
mod words;

pub(crate) use subjects::check as check_subjects;
pub(crate) use words::{check as check_words, list as list_words, lower as lower_ceilings};
