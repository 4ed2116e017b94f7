//! The commands of the README's section "Install", as printed: `cargo xtask dist --test`.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use bridge_lab::{kubernetes::ApiServer, lab::Lab};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn given(name: &str) -> Result<PathBuf> {
    let path = env::var_os(name);
    path.map(PathBuf::from).with_context(|| format!("{name} is unset: run `cargo xtask dist --test`"))
}

/// Returns the lines of the section's console block, in their order.
fn commands() -> Result<Vec<String>> {
    let readme = fs::read_to_string(Path::new(ROOT).join("README.md"))?;
    let section = readme.split_once("\n## Install\n").context("README.md has no section Install")?.1;
    let section = section.split("\n## ").next().unwrap_or_default();
    let block = section.split_once("```console\n").and_then(|(_, rest)| rest.split_once("```"));
    Ok(block.context("the section Install has no commands")?.0.lines().map(str::to_owned).collect())
}

/// Commands that the printed lines call, redirected into a Debian root.
struct Redirected {
    bin: PathBuf,
    root: PathBuf,
}

impl Redirected {
    fn new(lab: &Lab, root: PathBuf, artefacts: &Path) -> Result<Self> {
        let bin = lab.directory().join("bin");
        fs::create_dir_all(&bin)?;
        let inside = root.join("artefacts");
        fs::create_dir_all(&inside)?;
        for file in fs::read_dir(artefacts)? {
            let file = file?;
            fs::copy(file.path(), inside.join(file.file_name()))?;
        }
        let name = root.display();
        let in_root = |program: &str| {
            format!("exec chroot {name} sh -c 'cd /artefacts && exec {program} \"$@\"' sh \"$@\"")
        };
        // Debian's rpm asks for confirmation by an option, and Debian's shell is none of its packages.
        let rpm = format!("exec /usr/bin/rpm --root {name} --nodeps --force-debian \"$@\"");
        let programs = ["dpkg", "install", "tar"].map(|program| (program, in_root(program)));
        for (program, script) in programs.into_iter().chain([("rpm", rpm)]) {
            fs::write(bin.join(program), format!("#!/bin/sh\n{script}\n"))?;
            fs::set_permissions(bin.join(program), fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { bin, root })
    }

    /// Runs a printed command in `folder`.
    fn run(&self, line: &str, folder: &Path) -> Result<String> {
        let path = env::var("PATH").unwrap_or_default();
        let mut shell = Command::new("sh");
        shell.args(["-euc", line]).current_dir(folder);
        shell.env("PATH", format!("{}:{path}", self.bin.display()));
        output(&mut shell)
    }

    /// Runs a shell command in the root.
    fn inside(&self, script: &str) -> Result<String> {
        output(Command::new("chroot").arg(&self.root).args(["sh", "-euc", script]))
    }
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{command:?}:\n{}{}", text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}

#[test]
#[ignore = "needs packages and a Debian root: cargo xtask dist --test"]
fn every_way_of_the_readme_installs_as_printed() -> Result<()> {
    let artefacts = given("BRIDGE_DIST")?;
    let lab = Lab::builder().build()?;
    let redirected = Redirected::new(&lab, given("BRIDGE_ROOT")?, &artefacts)?;
    let version = format!("bridge-agent {}\n", env!("CARGO_PKG_VERSION"));
    let mut ways = Vec::new();
    for line in commands()? {
        let (prompt, command) = line.split_once(' ').with_context(|| line.clone())?;
        let words: Vec<_> = command.split_whitespace().take_while(|word| *word != "#").collect();
        let program = *words.first().with_context(|| line.clone())?;
        ways.push(program.to_owned());
        // Each way begins without the one before.
        redirected.inside(
            "dpkg --purge bridge-agent; rm -f /usr/local/bin/bridge-agent; ! command -v bridge-agent",
        )?;
        match (prompt, program) {
            ("#", "dpkg" | "rpm" | "install") => {
                redirected.run(command, &artefacts)?;
                ensure!(redirected.inside("bridge-agent --version")? == version, "{line}");
                if program == "rpm" {
                    redirected.run("rpm --erase bridge-agent", &artefacts)?;
                }
            }
            ("#", "tar") => {
                redirected.run(command, &artefacts)?;
                let version = redirected.inside("kubectl-bridge --version")?;
                ensure!(version == concat!("kubectl bridge ", env!("CARGO_PKG_VERSION"), "\n"), "{version}");
            }
            ("$", "kubectl") => {
                let server = ApiServer::start(&lab)?;
                let folder = words.last().with_context(|| line.clone())?;
                let folder = Path::new(ROOT).join(folder).display().to_string();
                let arguments = [&words[1..words.len() - 1], &[folder.as_str()]].concat();
                server.kubectl(&arguments, "")?;
                let image = "-o=jsonpath={.spec.template.spec.containers[0].image}";
                let image = server
                    .kubectl(&["-n", "bridge-system", "get", "daemonset", "bridge-agent", image], "")?;
                ensure!(image.ends_with(concat!(":", env!("CARGO_PKG_VERSION"))), "{image}");
            }
            ("$", "pip") => {
                let folder = lab.directory().join("venv");
                output(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
                let bin = folder.join("bin");
                redirected.run(&format!("PATH={}:$PATH; {command}", bin.display()), Path::new(ROOT))?;
                output(
                    Command::new(bin.join("python3"))
                        .args(["-c", "import bridge_client; bridge_client.Agent()"]),
                )?;
            }
            _ => bail!("a way that this test does not know: {line}"),
        }
    }
    ensure!(ways == ["dpkg", "rpm", "install", "tar", "kubectl", "pip"], "{ways:?}");
    Ok(())
}
