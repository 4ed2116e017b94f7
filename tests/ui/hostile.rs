//! Readers that are slow, that read nothing, or that begin and never end: of the page, of events, and of metrics.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::wait::{eventually, patience};

use crate::{
    attack::{ATTACK, attack, resident_kib},
    stage::{DENIED, METRICS, Stage},
};

/// The agent answers others within this time.
const AT_ONCE: Duration = Duration::from_millis(100);
/// The time of one request, whose answer must be whole.
fn timed(mut stream: impl Read + Write, request: &str) -> Result<Duration> {
    let start = Instant::now();
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer);
    ensure!(text.contains(" 200 OK") && text.ends_with('}'), "{text}");
    Ok(start.elapsed())
}

/// The median over the attack of the best of five times, since this machine has other work.
fn typical(times: &[Duration]) -> Result<Duration> {
    let mut best: Vec<_> = times.chunks(5).filter_map(|some| some.iter().min().copied()).collect();
    best.sort_unstable();
    best.get(best.len() / 2).copied().context("no time was taken")
}

#[test]
fn hostile_readers_cost_neither_memory_nor_the_answers_to_others() -> Result<()> {
    let stage = Stage::start()?;
    stage.open_flows(10_000)?;
    let lab = &stage.lab;
    let (origin, token) = (stage.origin(), stage.token());
    let host = origin.trim_start_matches("http://");
    let of_agent = [
        "GET /v1/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n",
        "GET /v1/events?last=1024 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /v1/flows?limit=10000 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /v1/sta",
    ];
    let of_agent = of_agent.map(ToOwned::to_owned);
    let of_metrics =
        ["GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(50), "GET /metr".to_owned(), String::new()];
    let of_page = ["events?last=1000", "flows?limit=10000", "status", "rules"].map(|path| {
        format!("GET /api/{path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n")
    });
    let of_page =
        [&of_page[..], &["GET / HT".to_owned(), "GET /app.js HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()]]
            .concat();
    let metrics = format!("127.0.0.1:{METRICS}");
    let status = "GET /v1/status HTTP/1.0\r\n\r\n";
    let page_status =
        format!("GET /api/status HTTP/1.0\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n");

    let unix = || {
        let stream = UnixStream::connect(stage.agent.socket())?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    let tcp = |address: String| -> _ {
        move || {
            let stream = TcpStream::connect(&address)?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        }
    };
    // Each once, so that the answers exist before they are compared.
    timed(UnixStream::connect(stage.agent.socket())?, status)?;
    timed(TcpStream::connect(host)?, &page_status)?;
    let before = [stage.agent.pid(), stage.page_pid()].map(resident_kib);
    let stop = AtomicBool::new(false);
    let (times, page_times, most) = thread::scope(|scope| {
        let attackers = [
            // Two pods by the socket, the node by the metrics port, and a user of the page's machine.
            scope.spawn(|| lab.c2().netns.run(|| attack(&of_agent, unix, &stop))),
            scope.spawn(|| lab.pods()[2].netns.run(|| attack(&of_agent, unix, &stop))),
            scope.spawn(|| lab.b().netns.run(|| attack(&of_metrics, tcp(metrics.clone()), &stop))),
            scope.spawn(|| attack(&of_page, tcp(host.to_owned()), &stop)),
        ];
        let events = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                stage.denied_datagrams(500, 2000)?;
            }
            anyhow::Ok(())
        });
        let mut times: [Vec<Duration>; 2] = Default::default();
        let mut page_times = Vec::new();
        let mut most = [0; 2];
        let start = Instant::now();
        let mut measure = || -> Result<()> {
            // An operator, and a pod.
            for (netns, times) in [&lab.b().netns, &lab.c1().netns].into_iter().zip(&mut times) {
                let time = netns.run(|| timed(UnixStream::connect(stage.agent.socket())?, status));
                times.push(time?);
            }
            // The page may be full of its owner's own connections: those that hold no request give way.
            page_times
                .extend(TcpStream::connect(host).ok().and_then(|stream| timed(stream, &page_status).ok()));
            for (most, pid) in most.iter_mut().zip([stage.agent.pid(), stage.page_pid()]) {
                *most = resident_kib(pid)?.max(*most);
            }
            Ok(())
        };
        let mut measured = Ok(());
        while measured.is_ok() && start.elapsed() < ATTACK {
            measured = measure();
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
        let opened = attackers.map(|attacker| attacker.join().unwrap_or(0));
        println!("connections of the attackers: {opened:?}");
        drop(events.join());
        measured.map(|()| (times, page_times, most))
    })?;
    let [operator, pod] = times.map(|times| typical(&times));
    let (operator, pod, page) = (operator?, pod?, typical(&page_times)?);
    let [agent_before, page_before] = before;
    let grown = [most[0].saturating_sub(agent_before?), most[1].saturating_sub(page_before?)];
    println!(
        "status: operator {operator:?}, pod {pod:?}, page {page:?}; memory: agent and page {grown:?} KiB more"
    );
    ensure!(operator < AT_ONCE && pod < AT_ONCE, "the agent answers in {operator:?} and {pod:?}");
    ensure!(grown[0] < 32 * 1024, "the agent grew by {} KiB", grown[0]);
    ensure!(grown[1] < 32 * 1024, "the page grew by {} KiB", grown[1]);

    // The page and its events go on.
    let after = eventually(patience(Duration::from_secs(30)), || {
        timed(TcpStream::connect(host).ok()?, &page_status).ok().filter(|time| *time < Duration::from_secs(1))
    });
    ensure!(after.is_some(), "the page does not recover");
    let mut events = TcpStream::connect(host)?;
    events.set_read_timeout(Some(patience(Duration::from_secs(10))))?;
    events.write_all(of_page[0].replace("?last=1000", "?last=0").as_bytes())?;
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains(&format!("\"destinationPort\":{DENIED}")) {
        let length = events.read(&mut buffer).context("no event of a refused connection")?;
        ensure!(length > 0, "the page ended the stream: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        stage.connect(DENIED)?;
    }
    Ok(())
}
