//! One connection that is kept alive, byte for byte: nothing is sent again behind a test's back.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;

use super::http::Answer;
use super::server::PATIENCE;

/// A connection to a gateway.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects to `http://HOST:PORT`.
    #[track_caller]
    pub fn open(url: &str) -> Self {
        let stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    /// Asks, and reads the whole answer.
    pub fn get(&mut self, host: &str, path: &str) -> io::Result<Answer> {
        let mut answer = self.begin(host, path)?;
        match answer.headers.get("content-length") {
            Some(length) => {
                let length = length.parse().map_err(io::Error::other)?;
                let mut body = vec![0; length];
                self.stream.read_exact(&mut body)?;
                answer.body = String::from_utf8_lossy(&body).into_owned();
            }
            None => {
                while let Some(part) = self.part()? {
                    answer.body += &part;
                }
            }
        }
        Ok(answer)
    }

    /// Asks, and reads the head of the answer.
    pub fn begin(&mut self, host: &str, path: &str) -> io::Result<Answer> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        let status = status.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or(ErrorKind::InvalidData)?;
        let mut headers = BTreeMap::new();
        loop {
            let line = self.line()?;
            match line.split_once(':') {
                Some((name, value)) => {
                    headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
                }
                None => break,
            }
        }
        Ok(Answer {
            status,
            headers,
            body: String::new(),
        })
    }

    /// The next part of an answer that is sent in parts; none after its last.
    pub fn part(&mut self) -> io::Result<Option<String>> {
        let length = usize::from_str_radix(&self.line()?, 16).map_err(io::Error::other)?;
        let mut part = vec![0; length];
        self.stream.read_exact(&mut part)?;
        self.line()?;
        Ok((length > 0).then(|| String::from_utf8_lossy(&part).into_owned()))
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }
}
