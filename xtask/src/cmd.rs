//! Running other programs.

use std::{
    env,
    ffi::OsString,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::progress::Progress;

/// Directories that hold administration programs and that an unprivileged user's PATH may lack.
const ADMIN_DIRECTORIES: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// PATH, with the directories of administration programs behind it.
pub(crate) fn search_path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&path).collect();
    for directory in ADMIN_DIRECTORIES.map(PathBuf::from) {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    env::join_paths(directories).unwrap_or(path)
}

/// The first file called `name` in [`search_path`].
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    find_in(&search_path(), name)
}

fn find_in(path: &OsString, name: &str) -> Option<PathBuf> {
    env::split_paths(path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// A command that finds administration programs.
pub(crate) fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.env("PATH", search_path());
    command
}

/// The cargo that runs us, and with it the toolchain of the user side.
pub(crate) fn cargo() -> Command {
    command(cargo_path())
}

/// See [`cargo`].
pub(crate) fn cargo_path() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// The compiler of [`cargo`].
pub(crate) fn rustc_path() -> PathBuf {
    cargo_path().with_file_name("rustc")
}

/// Returns whether we run as root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether [`as_root`] works.
pub(crate) fn can_be_root() -> bool {
    is_root() || find_program("sudo").is_some()
}

/// `program`, by sudo if we are not root.
///
/// # Errors
/// Neither root nor sudo: names the command to type.
pub(crate) fn as_root(program: &Path, arguments: &[OsString]) -> Result<Command> {
    if is_root() {
        let mut command = command(program);
        command.args(arguments);
        return Ok(command);
    }
    let Some(sudo) = find_program("sudo") else {
        let mut plain = Command::new(program);
        plain.args(arguments);
        bail!("this needs root, and there is no sudo here: as root, type\n  {}", show(&plain));
    };
    let mut command = command(sudo);
    // sudo's own PATH may lack cargo and its tools; `-E` keeps the rest of the environment.
    let mut path = OsString::from("PATH=");
    path.push(search_path());
    command.arg("-E").arg("env").arg(path).arg(program).args(arguments);
    Ok(command)
}

/// The command as one would type it.
pub(crate) fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| quote(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// The command without its folder and options, for a line of progress.
fn brief(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = command.get_args().filter(|word| !word.as_encoded_bytes().starts_with(b"-")).take(2);
    std::iter::once(program).chain(words).map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:+,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Runs `command` to its end, its output ours.
///
/// # Errors
/// It cannot be started, or fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.status().with_context(|| format!("cannot start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status})");
    }
    Ok(())
}

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// It cannot be started, or fails; the message holds its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let _progress = Progress::of(brief(command));
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed ({}):\n{}", output.status, stderr.trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` wrote something other than UTF-8"))
}

/// Becomes `command`.
///
/// # Errors
/// It cannot be started.
pub(crate) fn become_command(command: &mut Command) -> Result<()> {
    let shown = show(command);
    Err(command.exec()).with_context(|| format!("cannot start `{shown}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_they_are_typed() {
        let mut command = Command::new("apt-get");
        command.args(["install", "a b", "it's", ""]);
        assert_eq!(show(&command), r"apt-get install 'a b' 'it'\''s' ''");
    }

    #[test]
    fn a_line_of_progress_names_the_program_and_its_first_words() {
        let mut command = Command::new("/usr/bin/apt-get");
        command.args(["-q", "install", "--yes", "qemu", "busybox"]);
        assert_eq!(brief(&command), "apt-get install qemu");
    }

    #[test]
    fn administration_programs_are_found_without_their_directories_in_path() {
        let path = search_path();
        let directories: Vec<_> = env::split_paths(&path).collect();
        for directory in ADMIN_DIRECTORIES {
            assert!(directories.iter().any(|d| d == Path::new(directory)), "{directory}");
        }
    }
}
