//! `bridge-agent dial-stdio`: standard input and output become a connection to the agent's socket.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::Shutdown,
    os::{fd::AsFd as _, unix::net::UnixStream},
    thread,
};

use clap::Args;

use super::{error::Error, global::Global};
use crate::api::client;

/// Connect standard input and output to the agent's socket.
#[derive(Debug, Args)]
pub struct Dial {}

impl Dial {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let path = global.agent_socket();
        let socket =
            UnixStream::connect(&path).map_err(|source| client::Error::NotRunning { path, source })?;
        let failed = |source| Error::Stream { action: "cannot pass bytes to and from the agent", source };
        let requests = socket.try_clone().map_err(failed)?;
        // Unbuffered: an answer need not end with a line.
        let input = File::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
        let output = File::from(io::stdout().as_fd().try_clone_to_owned().map_err(failed)?);
        let send = move || {
            // The end of either side ends the connection; the other direction sees it.
            drop(pass(&mut &input, &mut &requests));
            drop(requests.shutdown(Shutdown::Write));
        };
        thread::Builder::new().name("requests".into()).spawn(send).map_err(failed)?;
        pass(&mut &socket, &mut &output).map_err(failed)
    }
}

/// Copies bytes as they arrive. The traits hide the descriptors: between a socket and a pipe, [`io::copy`] would splice, which
/// waits for more bytes than there are.
fn pass(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    io::copy(from, to).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_when_they_arrive_also_from_a_socket_to_a_pipe() {
        let (mut agent, socket) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let thread = thread::spawn(move || pass(&mut &socket, &mut &writer));
        for text in [b"one", b"two"] {
            agent.write_all(text).unwrap();
            let mut buffer = [0; 3];
            reader.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, text);
        }
        drop(agent);
        thread.join().unwrap().unwrap();
    }
}
