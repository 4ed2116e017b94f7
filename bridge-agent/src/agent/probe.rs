//! Probes of a trial: connects to each address until it has answered once.

use std::{io, time::Duration};

use tokio::{net::TcpStream, task::JoinSet};

use crate::state::Probe;

/// Timeout of a connection attempt.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(200);

/// Opens a new connection: an existing one would pass whatever the policy.
async fn connect(Probe { host, port }: &Probe) -> io::Result<()> {
    match tokio::time::timeout(TIMEOUT, TcpStream::connect((host.as_str(), *port))).await {
        Ok(connected) => connected.map(drop),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {TIMEOUT:?}"))),
    }
}

/// Connects to all probes repeatedly, until each has answered once. Calls `report` after each attempt.
pub(super) async fn all_answer(
    probes: Vec<Probe>,
    report: impl Fn(usize, &io::Result<()>) + Clone + Send + 'static,
) {
    let mut pending = JoinSet::new();
    for (index, probe) in probes.into_iter().enumerate() {
        let report = report.clone();
        pending.spawn(async move {
            loop {
                let answer = connect(&probe).await;
                report(index, &answer);
                if answer.is_ok() {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
    while pending.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn all_probes_must_answer_and_each_is_asked_until_it_does() {
        let there = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let late = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let probe = |address| format!("tcp://{address}").parse::<Probe>().unwrap();
        let probes = vec![probe(there.local_addr().unwrap()), probe(late)];
        let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let report = seen.clone();
        let probing =
            all_answer(probes, move |index, answer| report.lock().unwrap().push((index, answer.is_ok())));
        let opening = async {
            while !seen.lock().unwrap().contains(&(1, false)) {
                tokio::task::yield_now().await;
            }
            tokio::net::TcpListener::bind(late).await.unwrap()
        };
        let (_listener, ()) =
            tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(opening, probing) })
                .await
                .expect("all have answered");
        let seen = seen.lock().unwrap();
        assert_eq!(seen.iter().filter(|(index, _)| *index == 0).count(), 1, "{seen:?}");
        assert_eq!(seen.last(), Some(&(1, true)));
    }
}
