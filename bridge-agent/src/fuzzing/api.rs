//! HTTP on the agent's socket.

use std::{cell::OnceCell, path::PathBuf, time::Duration};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

use crate::{
    api::{Server, apply, leases},
    config,
    model::PortRange,
    pool::{Layout, Settings, backend::Backend, layout::Occupied, service::Service},
    state::{Shared, Status},
};

/// Nothing that is asked here takes long.
const DEADLINE: Duration = Duration::from_secs(20);

/// The server as the agent runs it, with a pool in its memory behind it; a request that would change enforcement is
/// answered as if the agent were stopping.
struct Served {
    runtime: Runtime,
    shared: Shared,
    socket: PathBuf,
    _folder: TempDir,
}

fn served() -> Served {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a directory for the socket");
    let socket = folder.path().join("agent.sock");
    let (shared, _) = Shared::new(Status::default());
    let server = {
        let _inside = runtime.enter();
        // As every Rust program does before `main`, which is libFuzzer's here: a client that hangs up must not end the
        // process.
        drop(signal(SignalKind::pipe()).expect("a handler"));
        Server::bind(&socket, &config::Api::default()).expect("a socket")
    };
    runtime.spawn(server.serve(shared.clone()));
    Served { runtime, shared, socket, _folder: folder }
}

impl Served {
    /// All its ports are free.
    fn renew_pool(&self) {
        let settings = Settings {
            ports: vec![PortRange { first: 61001, last: 61020 }],
            destinations: vec!["192.168.31.0/24".parse().expect("a network")],
            ..Settings::default()
        };
        let layout = Layout::plan(&settings, &Occupied::default()).expect("there are ports");
        let backend = Backend::userspace(layout, Duration::from_secs(1));
        self.shared.set_pool(Some(Service::new(backend, settings.destinations)));
    }
}

/// The bytes as bodies of requests, as all that comes over a connection, and, if their first line is a method and a
/// path, as a request that is framed as it must be: that one is answered, and not with an error of the agent's own.
///
/// # Panics
/// It is not so.
pub fn api(input: &[u8]) -> bool {
    thread_local! {
        static SERVED: OnceCell<Served> = const { OnceCell::new() };
    }
    let request = apply::parse(input);
    if let Ok(request) = &request {
        for probe in &request.probes {
            assert_eq!(probe.to_string().parse().as_ref(), Ok(probe));
        }
    }
    let request = leases::lease_request(input);
    SERVED.with(|served| {
        let served = served.get_or_init(self::served);
        served.renew_pool();
        served.runtime.block_on(async {
            let mut answer = converse(&served.socket, input, true).await;
            if let Some(request) = framed(input) {
                answer = converse(&served.socket, &request, false).await;
                let status = answer.strip_prefix(b"HTTP/1.1 ").and_then(|rest| rest.first_chunk::<3>());
                assert!(status.is_some_and(|status| status != b"500"), "{}", answer.escape_ascii());
            }
            request.is_ok() || request.is_ok() || answer.starts_with(b"HTTP/1.1 ")
        })
    })
}

/// How long a client waits for an answer before it hangs up.
const PATIENCE: Duration = Duration::from_millis(200);

/// Sends `bytes`, and returns the answer until the other side hangs up or begins a stream without end.
async fn converse(socket: &PathBuf, bytes: &[u8], hang_up: bool) -> Vec<u8> {
    let talk = async {
        let mut stream = UnixStream::connect(socket).await.expect("the server listens");
        let (mut from, mut to) = stream.split();
        let mut answer = Vec::new();
        let heard = tokio::sync::Notify::new();
        let say = async {
            // The server may close the connection before all is sent.
            let _ = to.write_all(bytes).await;
            if hang_up {
                // A client that hangs up at once may get no answer.
                let _ = tokio::time::timeout(PATIENCE, heard.notified()).await;
                let _ = to.shutdown().await;
            }
        };
        let hear = async {
            let is_stream = |answer: &[u8]| answer.windows(20).any(|part| part == b"application/x-ndjson");
            while from.read_buf(&mut answer).await.is_ok_and(|length| length > 0) && !is_stream(&answer) {
                heard.notify_one();
            }
        };
        tokio::join!(say, hear);
        answer
    };
    tokio::time::timeout(DEADLINE, talk).await.expect("an answer in time")
}

/// `METHOD PATH`, and the body from the next line on. Nothing if an HTTP server may refuse that by itself, or if it is to
/// wait for ports.
fn framed(input: &[u8]) -> Option<Vec<u8>> {
    let (head, body) = input.split_at(input.iter().position(|byte| *byte == b'\n')?);
    let body = &body[1..];
    let (method, path) = str::from_utf8(head).ok()?.split_once(' ')?;
    let in_path = |byte: u8| byte.is_ascii_graphic() && !b"\"<>#\\^`{|}".contains(&byte);
    let waits = leases::lease_request(body).is_ok_and(|request| !request.wait.is_zero());
    if !["GET", "POST", "DELETE", "PUT"].contains(&method)
        || !path.starts_with('/')
        || !path.bytes().all(in_path)
        || path.len() > 4096
        || waits
    {
        return None;
    }
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: bridge\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    Some([head.as_bytes(), body].concat())
}
