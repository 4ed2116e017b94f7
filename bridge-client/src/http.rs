//! As much of HTTP/1.1 as one request and one JSON answer on a unix socket need (no input or output in here).

use serde::{Deserialize, de::DeserializeOwned};

use crate::Error;

/// Longest answer that is read; a lease is some hundred bytes.
pub(crate) const MAX_ANSWER: usize = 1 << 20;

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

/// Body of a refusal.
#[derive(Deserialize)]
struct Problem {
    code: String,
    error: String,
}

/// A request; the connection stays open after it.
pub(crate) fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: bridge\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Parses the bytes read so far; `None` if there is more to come.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Answer>, Error> {
    let broken = |fault: &str| Error::Protocol(fault.to_owned());
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return if bytes.len() > MAX_ANSWER { Err(broken("endless header")) } else { Ok(None) };
    };
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| broken("header is not text"))?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok())
        .ok_or_else(|| broken("no HTTP/1.1 status"))?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Ok(0), |(_, value)| value.trim().parse::<usize>())
        .map_err(|_| broken("content-length"))?;
    if length > MAX_ANSWER {
        return Err(broken("the answer is too long"));
    }
    let body = &bytes[end + 4..];
    Ok((body.len() >= length).then(|| Answer { status, body: body[..length].to_vec() }))
}

impl Answer {
    /// Returns the body of a success, or the agent's error.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        if (200..300).contains(&self.status) {
            return serde_json::from_slice(&self.body).map_err(|error| Error::Protocol(error.to_string()));
        }
        match serde_json::from_slice::<Problem>(&self.body) {
            Ok(problem) => Err(Error::Refused { code: problem.code, text: problem.error }),
            Err(_) => Err(Error::Protocol(format!("status {}", self.status))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_may_come_in_pieces() {
        let whole =
            b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}";
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut]).unwrap(), None, "after {cut} bytes");
        }
        assert_eq!(parse(whole).unwrap(), Some(Answer { status: 201, body: b"{\"a\":1}".to_vec() }));
    }

    #[test]
    fn what_is_not_http_is_an_error() {
        for bad in
            ["SSH-2.0-x\r\n\r\n", "HTTP/1.1 abc\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"]
        {
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(parse(&vec![b'x'; MAX_ANSWER + 1]).is_err());
    }

    #[test]
    fn a_refusal_keeps_its_reason() {
        let answer = Answer { status: 409, body: br#"{"code":"exhausted","error":"wait"}"#.to_vec() };
        let error = answer.json::<serde_json::Value>().unwrap_err();
        assert!(matches!(&error, Error::Refused { code, .. } if code == "exhausted"), "{error:?}");
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::AddrNotAvailable);
    }
}
