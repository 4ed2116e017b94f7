//! The quick start of the README, as it stands there: both configurations, then each command with its output.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{agent::Agent, lab::Lab, wait::eventually};

const DEADLINE: Duration = Duration::from_secs(10);
/// The agents of a lab have sockets and pins of their own.
const COMMAND: &str = "bridge-agent ";

fn readme() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Returns the code blocks in `language`.
fn blocks<'a>(document: &'a str, language: &str) -> Vec<&'a str> {
    let begin = format!("```{language}\n");
    document.split(begin.as_str()).skip(1).filter_map(|rest| rest.split_once("```")).map(|(b, _)| b).collect()
}

/// Returns the command after the prompt that begins with `beginning`, and its output.
fn session<'a>(document: &'a str, beginning: &str) -> Result<(&'a str, String)> {
    let block = blocks(document, "console").into_iter().find(|block| {
        block.lines().any(|line| line.strip_prefix("# ").is_some_and(|line| line.starts_with(beginning)))
    });
    let mut lines = block.with_context(|| format!("README.md has no `{beginning}`"))?.lines();
    let command = lines.find_map(|line| line.strip_prefix("# ").filter(|line| line.starts_with(beginning)));
    let output = lines.take_while(|line| !line.starts_with("# ")).map(|line| format!("{line}\n")).collect();
    Ok((command.context("the line just found")?, output))
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(script);
    command
}

/// Runs a command of the README with the program, socket and pins of the lab's agent.
fn run(lab: &Lab, agent: &Agent, command: &str) -> Result<String> {
    let own = agent.command(&[]);
    let words: Vec<_> = std::iter::once(own.get_program()).chain(own.get_args()).collect();
    let words = words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>();
    let (command, global) = match command.strip_prefix(COMMAND) {
        Some(rest) => match rest.split_once(" -- ") {
            Some((before, behind)) => {
                (format!("{} {before}", words[0]), format!(" {} -- {behind}", words[1..].join(" ")))
            }
            None => (format!("{} {rest}", words[0]), format!(" {}", words[1..].join(" "))),
        },
        None => (command.to_owned(), String::new()),
    };
    let output = lab.a().netns.run(|| shell(&format!("{command}{global} 2>&1")).output())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Replaces each number that may differ from run to run.
fn without_chance(text: &str) -> String {
    let mut words = Vec::new();
    for word in text.split_whitespace() {
        words.push(match words.last().map(String::as_str) {
            Some("port") if word.parse::<u16>().is_ok_and(|port| (61001..=61100).contains(&port)) => {
                "POOL".into()
            }
            Some("after") => "TIME".into(),
            _ => word.to_owned(),
        });
    }
    words.join(" ")
}

#[test]
fn the_quick_start_of_the_readme_prints_the_output_that_it_shows() -> Result<()> {
    let readme = readme()?;
    let yaml = blocks(&readme, "yaml");
    ensure!(yaml.len() == 2, "the README has two configurations, node and host");
    let lab = Lab::builder().without_routes().build()?;
    let mut server = Command::new("python3");
    server.args(["-m", "http.server", "8080", "--directory", "/usr/share/doc"]);
    let _server = lab.c1().netns.spawn_command(server)?;
    let listening = || lab.c1().netns.run(|| std::net::TcpStream::connect("10.200.1.91:8080")).ok();
    eventually(DEADLINE, listening).context("the server in the pod does not listen")?;

    let saved = "persistence: {save: never}\n";
    let node = Agent::start(&lab, lab.b(), &format!("{}{saved}", yaml[0]))?;
    let host = Agent::start(&lab, lab.a(), &format!("{}{saved}", yaml[1]))?;
    for (agent, beginning) in [
        (&host, "bridge-agent routes list"),
        (&host, "curl -sS http://10.200.1.91:8080/"),
        (&host, "bridge-agent exec"),
        (&node, "bridge-agent flows"),
    ] {
        let (command, expected) = session(&readme, beginning)?;
        let printed = || Some(run(&lab, agent, command).unwrap_or_default());
        let expected = without_chance(&expected);
        if beginning == "bridge-agent flows" {
            // Port and ages are of this run.
            let printed = printed().unwrap_or_default();
            let columns = |text: &str| text.lines().next().unwrap_or_default().split_whitespace().count();
            ensure!(columns(&printed) == columns(&session(&readme, beginning)?.1), "{printed}");
            ensure!(
                printed.contains("10.200.1.91:8080  inbound") && printed.contains("devices-to-api"),
                "{printed}"
            );
            continue;
        }
        let same = eventually(DEADLINE, || printed().filter(|text| without_chance(text) == expected));
        ensure!(
            same.is_some(),
            "`{command}`: the README shows\n{expected}\nand this is\n{}",
            printed().unwrap_or_default()
        );
    }
    Ok(())
}

#[test]
fn the_configurations_of_the_readme_are_valid_and_complete() -> Result<()> {
    for yaml in blocks(&readme()?, "yaml") {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), yaml)?;
        let output = Command::new(bridge_lab::agent::program()?)
            .arg("check")
            .arg("--config")
            .arg(file.path())
            .output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
