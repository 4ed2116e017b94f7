//! `record`: plays the story of the README in the lab, and writes it as an asciicast and as a moving picture.
//!
//! Every command really runs, in the network namespace of its host, and its output is what it printed; typing and reading
//! get a time of their own.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::{self, Agent},
    lab::{Family, Host, Lab},
    wait::eventually,
};
use clap::Parser;
use serde_json::json;

const WIDTH: usize = 104;
const HEIGHT: usize = 30;
/// Seconds for a typed character, before a command, and after its output.
const KEY: f64 = 0.035;
const THOUGHT: f64 = 0.7;
const READING: f64 = 1.9;
/// Seconds that the last screen stays.
const END: f64 = 6.0;

const NODE: &str = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\nenforcement: {engines: [ebpf]}\n\
                    persistence: {save: never}\nrules: []\n";
const RULE: &str = "rules:\n  - name: devices-to-api\n    direction: inbound\n    protocol: tcp\n    ports: [8080]\n    \
                    sourcePorts: [\"61001-61100\"]\n    action: allow\n";

/// Play the story of the README and write docs/demo.cast and docs/demo.svg.
#[derive(Parser)]
struct Arguments {
    /// The folder to write to
    #[arg(default_value = "docs")]
    folder: PathBuf,
}

/// A text that appears on the screen at a time, in seconds.
struct Output {
    at: f64,
    text: String,
}

#[derive(Default)]
struct Recording {
    now: f64,
    outputs: Vec<Output>,
}

impl Recording {
    fn put(&mut self, text: impl Into<String>) {
        self.outputs.push(Output { at: self.now, text: text.into() });
    }

    /// Types a command at the prompt of a host, and shows its output.
    fn command(&mut self, host: &str, command: &str, output: &str) {
        self.put(format!("\u{1b}[1;36m{host}\u{1b}[0m$ "));
        self.now += THOUGHT;
        for key in command.chars() {
            self.put(key);
            self.now += KEY;
        }
        self.put("\r\n");
        self.now += 0.25;
        self.put(output.trim_end().replace('\n', "\r\n") + "\r\n\r\n");
        self.now += READING;
    }

    fn comment(&mut self, text: &str) {
        self.put(format!("\u{1b}[2m# {text}\u{1b}[0m\r\n"));
        self.now += 1.2;
    }

    /// asciicast version 2: a header, and a line for each output.
    fn cast(&self) -> String {
        let header = json!({ "version": 2, "width": WIDTH, "height": HEIGHT, "title": "bridge" });
        let lines = self.outputs.iter().map(|Output { at, text }| {
            // To the millisecond.
            json!([(at * 1000.0).round() / 1000.0, "o", text]).to_string() + "\n"
        });
        format!("{header}\n") + &lines.collect::<String>()
    }
}

/// Runs a program in the namespace of a host, and returns both of its outputs, also when it fails.
fn run(host: &Host, mut command: Command) -> Result<String> {
    let output = host.netns.run(|| command.output())?;
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

fn bridge(agent: &Agent, host: &Host, arguments: &[&str]) -> Result<String> {
    run(host, agent.command(arguments))
}

fn play() -> Result<Recording> {
    let lab = Lab::builder().pods(1).build()?;
    let (lan, node, pod) = (lab.a(), lab.b(), lab.c1());
    let mut server = Command::new("python3");
    server.args(["-m", "http.server", "8080", "--directory"]).arg(lab.directory());
    server.stdout(Stdio::null()).stderr(Stdio::null());
    let _server = pod.netns.spawn_command(server)?;
    let on_node = Agent::start(&lab, node, NODE)?;
    let host = format!(
        "role: host\nnetworks: {{pods: [10.200.0.0/16]}}\nroutes:\n  static: [{{to: {}, via: {}}}]\nportPool: {{ports: [\"61001-61100\"]}}\n",
        lab.pod_network(1, Family::V4),
        node.v4
    );
    let on_lan = Agent::start(&lab, lan, &host)?;
    let url = format!("http://{}/", pod.at(Family::V4, 8080));
    let up = eventually(Duration::from_secs(10), || {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "1", &url]);
        pod.netns.output(curl).ok()
    });
    ensure!(up.is_some(), "the server in the pod does not answer");

    let mut recording = Recording::default();
    recording.comment("A LAN host wants to talk to a pod. The node denies what no rule allows.");
    let monitor = agent_output(&on_node, node, &["monitor", "--count", "1"])?;
    let mut curl = Command::new("curl");
    curl.args(["-sS", &url]);
    recording.command("lan", &format!("curl -sS {url}"), &run(lan, curl)?);
    let seen = monitor.wait_with_output()?;
    recording.command("node", "bridge-agent monitor", String::from_utf8_lossy(&seen.stdout).trim_end());

    recording.comment("One rule, on trial: it is rolled back unless it is confirmed.");
    let file = lab.directory().join("bridge.yaml");
    fs::write(
        &file,
        NODE.replace("rules: []\n", RULE) + &format!("api: {{socket: {}}}\n", on_node.socket().display()),
    )?;
    recording.command("node", "tail -7 bridge.yaml", RULE);
    let applied = bridge(&on_node, node, &["apply", &file.display().to_string(), "--confirm", "60s"])?;
    recording.command("node", "bridge-agent apply bridge.yaml --confirm 60s", &applied);

    recording.comment("The rule wants a source port of the pool: curl gets one, unchanged.");
    let format = "%{http_code} from port %{local_port}\\n";
    let mut exec = Command::new(agent::program()?);
    exec.arg("exec").arg("--config").arg(on_lan.config()).arg("--pin-root").arg(on_lan.pins());
    exec.args(["--", "curl", "-sS", "-o", "/dev/null", "-w", format, &url]);
    let exec = run(lan, exec)?;
    recording.command(
        "lan",
        &format!("bridge-agent exec -- curl -sS -o /dev/null -w '{format}' {url}"),
        &exec,
    );
    recording.command("node", "bridge-agent confirm", &bridge(&on_node, node, &["confirm"])?);
    recording.command("node", "bridge-agent flows", &bridge(&on_node, node, &["flows"])?);
    recording.command("node", "bridge-agent rules", &bridge(&on_node, node, &["rules"])?);
    let whole: String = recording.outputs.iter().map(|output| output.text.as_str()).collect();
    ensure!(whole.contains("200 from port 610") && whole.contains("no_rule"), "another story: {whole}");
    Ok(recording)
}

/// Starts a command of the agent whose output is read later.
fn agent_output(agent: &Agent, host: &Host, arguments: &[&str]) -> Result<std::process::Child> {
    let mut command = agent.command(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let child = host.netns.run(|| command.spawn())?;
    // It reads from the agent once it has connected: the kernel shows its socket.
    let connected = eventually(Duration::from_secs(10), || {
        let sockets = fs::read_dir(format!("/proc/{}/fd", child.id())).ok()?;
        let open = sockets.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        (open.filter(|target| target.to_string_lossy().starts_with("socket:")).count() > 0).then_some(())
    });
    ensure!(connected.is_some(), "monitor does not connect");
    Ok(child)
}

/// A line of the screen in pieces of one colour.
type Line = Vec<(&'static str, String)>;

/// Appends a text to the lines of the screen; knows colours and line ends alone, since no command of the story uses more.
fn print(lines: &mut Vec<Line>, text: &str) {
    let mut class = "";
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some(code) = rest.strip_prefix("\u{1b}[") {
            let (code, after) = code.split_once('m').unwrap_or((code, ""));
            class = match code {
                "1;36" => "p",
                "2" => "q",
                _ => "",
            };
            rest = after;
            continue;
        }
        rest = &rest[first.len_utf8()..];
        if first == '\n' {
            lines.push(Line::new());
        } else if first != '\r' {
            let full = lines
                .last()
                .is_none_or(|line| line.iter().map(|(_, text)| text.chars().count()).sum::<usize>() >= WIDTH);
            if full {
                lines.push(Line::new());
            }
            let line = lines.last_mut().expect("a line was pushed");
            match line.last_mut() {
                Some((last, text)) if *last == class => text.push(first),
                _ => line.push((class, first.to_string())),
            }
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace(' ', "\u{a0}")
}

/// A picture that moves by CSS: each line appears at its time, and the screen scrolls by steps.
fn svg(recording: &Recording) -> String {
    const ROW: usize = 19;
    let total = recording.now + END;
    let percent = |at: f64| 100.0 * at / total;
    let mut lines: Vec<Line> = vec![Line::new()];
    // For each line, the time at which it is complete: a typed line appears key by key by its own animation.
    let mut times: Vec<(f64, f64)> = vec![(0.0, 0.0)];
    for Output { at, text } in &recording.outputs {
        let before = lines.len();
        print(&mut lines, text);
        times[before - 1].1 = *at;
        times.resize(lines.len(), (*at, *at));
    }
    let (width, height) = (WIDTH * 8 + 32, HEIGHT * ROW + 32);
    let mut style = String::new();
    let mut body = String::new();
    for (index, (line, (from, to))) in lines.iter().zip(&times).enumerate() {
        if line.is_empty() {
            continue;
        }
        let y = index * ROW + 30;
        let spans: String = line
            .iter()
            .map(|(class, text)| format!("<tspan class=\"{class}\">{}</tspan>", escape(text)))
            .collect();
        _ = write!(body, "<text x=\"16\" y=\"{y}\" class=\"l{index}\">{spans}</text>");
        let (start, end) = (percent(*from), percent(*to));
        if to - from > 0.5 {
            let keys = line.iter().map(|(_, text)| text.chars().count()).sum::<usize>();
            let hidden = |part: usize| format!("clip-path:inset(0 {}px 0 0)", part * 8);
            _ = write!(
                style,
                ".l{index}{{animation:k{index} {total:.1}s steps(1) infinite}}@keyframes k{index}{{0%{{opacity:0}}"
            );
            let prompt = line.first().map_or(0, |(_, text)| text.chars().count() + 2);
            let typed = keys.saturating_sub(prompt);
            let begin = start + percent(THOUGHT);
            _ = write!(style, "{start:.2}%{{opacity:1;{}}}", hidden(typed));
            for key in (0..typed).step_by(3) {
                let at = begin + (end - begin) * key as f64 / typed.max(1) as f64;
                _ = write!(style, "{at:.2}%{{opacity:1;{}}}", hidden(typed - key));
            }
            _ = write!(style, "{end:.2}%,100%{{opacity:1;clip-path:none}}}}");
        } else {
            _ = write!(
                style,
                ".l{index}{{animation:k{index} {total:.1}s steps(1) infinite}}@keyframes k{index}{{0%{{opacity:0}}{start:.2}%,100%{{opacity:1}}}}"
            );
        }
    }
    // The screen scrolls when a line would be below its end.
    _ = write!(style, ".s{{animation:s {total:.1}s steps(1) infinite}}@keyframes s{{0%{{transform:none}}");
    for (index, (from, _)) in times.iter().enumerate().skip(HEIGHT) {
        _ = write!(
            style,
            "{:.2}%{{transform:translateY(-{}px)}}",
            percent(*from),
            (index + 1 - HEIGHT) * ROW
        );
    }
    let last = lines.len().saturating_sub(HEIGHT) * ROW;
    _ = write!(style, "100%{{transform:translateY(-{last}px)}}}}");
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\">\
         <title>A refused connection, a rule on trial, a connection from an allowed port</title><style>\
         text{{font:13.3px ui-monospace,\"DejaVu Sans Mono\",Menlo,Consolas,monospace;fill:#d7e0e2;white-space:pre}}.p{{fill:#5cc8bc;font-weight:bold}}.q{{fill:#8fa3a8}}\
         {style}</style><rect width=\"{width}\" height=\"{height}\" rx=\"10\" fill=\"#10181b\"/>\
         <svg x=\"0\" y=\"8\" width=\"{width}\" height=\"{}\"><g class=\"s\">{body}</g></svg></svg>\n",
        height - 16
    )
}

fn main() -> Result<()> {
    let Arguments { folder } = Arguments::parse();
    agent::program()?;
    let recording = play()?;
    let write = |name: &str, text: String| {
        let file: &Path = &folder.join(name);
        fs::write(file, &text).with_context(|| file.display().to_string())?;
        println!("{} ({} bytes)", file.display(), text.len());
        anyhow::Ok(())
    };
    write("demo.cast", recording.cast())?;
    write("demo.svg", svg(&recording))
}
