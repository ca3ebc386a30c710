//! A receiver of webhooks: a real HTTP server on a free port, which answers as a test wants.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use hmac::{Hmac, Mac};
use serde_json::Value;
use sha2::Sha256;

/// A request that came.
#[derive(Debug, Clone)]
pub struct Received {
    /// Its path.
    pub path: String,
    /// Its headers, in lower case.
    pub headers: BTreeMap<String, String>,
    /// Its body.
    pub body: Vec<u8>,
    /// What was answered.
    pub status: u16,
}

impl Received {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The `webhook-id`.
    pub fn id(&self) -> &str {
        &self.headers["webhook-id"]
    }

    /// Which of its signatures are by this secret, as the Standard Webhooks specification says:
    /// HMAC-SHA256 over `id.timestamp.body` under the Base64 key behind `whsec_`.
    pub fn signed_by(&self, secret: &str) -> usize {
        use base64_of_the_test::decode;
        let key = decode(secret.strip_prefix("whsec_").unwrap());
        let timestamp = &self.headers["webhook-timestamp"];
        let signatures = self.headers["webhook-signature"].split(' ');
        let valid = signatures.filter(|signature| {
            let mac = signature.strip_prefix("v1,").expect("version 1");
            let mut hmac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
            hmac.update(format!("{}.{timestamp}.", self.id()).as_bytes());
            hmac.update(&self.body);
            hmac.verify_slice(&decode(mac)).is_ok()
        });
        valid.count()
    }
}

/// Base64, so that what is tested is not checked with its own tools.
mod base64_of_the_test {
    pub fn decode(text: &str) -> Vec<u8> {
        let value = |b: u8| -> u32 {
            match b {
                b'A'..=b'Z' => u32::from(b - b'A'),
                b'a'..=b'z' => u32::from(b - b'a') + 26,
                b'0'..=b'9' => u32::from(b - b'0') + 52,
                b'+' => 62,
                b'/' => 63,
                other => panic!("{other} is no Base64"),
            }
        };
        let (mut bits, mut count, mut out) = (0_u32, 0, Vec::new());
        for b in text.bytes().filter(|b| *b != b'=') {
            bits = bits << 6 | value(b);
            count += 6;
            if count >= 8 {
                count -= 8;
                out.push(u8::try_from(bits >> count & 0xff).unwrap());
            }
        }
        out
    }
}

/// What a receiver answers: a status and headers.
pub type Verdict = (u16, Vec<(&'static str, String)>);

/// A receiver, which ends with its value.
pub struct Receiver {
    addr: SocketAddr,
    log: Arc<Mutex<Vec<Received>>>,
    ended: Arc<AtomicBool>,
}

impl Receiver {
    /// One that answers each request by a rule, which sees what came before.
    pub fn start(rule: impl Fn(&Received, &[Received]) -> Verdict + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let (seen, over, rule) = (log.clone(), ended.clone(), Arc::new(rule));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (seen, rule) = (seen.clone(), rule.clone());
                if let Ok(stream) = stream {
                    thread::spawn(move || while serve(&stream, &seen, &*rule).is_some() {});
                }
            }
        });
        Self { addr, log, ended }
    }

    /// One that takes everything.
    pub fn willing() -> Self {
        Self::start(|_, _| (204, Vec::new()))
    }

    /// Its URL, by address.
    pub fn url(&self) -> String {
        format!("http://{}/hook", self.addr)
    }

    /// What came so far.
    pub fn all(&self) -> Vec<Received> {
        self.log.lock().unwrap().clone()
    }

    /// What was taken so far.
    pub fn taken(&self) -> Vec<Received> {
        let mut all = self.all();
        all.retain(|r| r.status < 300);
        all
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.addr);
    }
}

/// One request on a connection; none at its end.
fn serve(
    stream: &TcpStream,
    seen: &Mutex<Vec<Received>>,
    rule: &(dyn Fn(&Received, &[Received]) -> Verdict + Send + Sync),
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned())
            }
            None => break,
        };
    }
    let length = headers.get("content-length")?.parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let mut received = Received {
        path,
        headers,
        body,
        status: 0,
    };
    let mut log = seen.lock().unwrap();
    let (status, more) = rule(&received, &log);
    received.status = status;
    log.push(received);
    drop(log);
    let mut answer = format!("HTTP/1.1 {status} Whatever\r\nContent-Length: 5\r\n");
    if status == 204 {
        answer = format!("HTTP/1.1 {status} Taken\r\n");
    }
    for (name, value) in more {
        answer += &format!("{name}: {value}\r\n");
    }
    answer += "\r\n";
    if status != 204 {
        answer += "no :(";
    }
    (&*stream).write_all(answer.as_bytes()).ok()
}
