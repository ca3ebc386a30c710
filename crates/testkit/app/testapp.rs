//! A small web application for tests that need a real process: it answers HTTP, prints lines,
//! and misbehaves on request. Built by this crate's build script from the standard library alone,
//! so that any test of any crate can run it: see `daybook_testkit::TESTAPP`.
//!
//! Flags:
//! `--text T`          what `/` answers (default `hello`)
//! `--port N`          listen there instead of on `$PORT`
//! `--exit CODE`       exit at once
//! `--exit-after N`    exit with code 3 after N answered requests
//! `--slow-start MS`   wait before listening
//! `--silent`          never listen
//! `--unhealthy`       answer 503 on `/` until `/heal` was asked
//! `--ignore-term`     ignore SIGTERM
//! `--print N`         print N numbered lines at start, odd ones to stderr
//! `--print-every MS`  print a numbered line every so often
//! `--child`           start a child in a session of its own that outlives it
//! `--describe T`      have an OpenAPI document with this title at `/openapi.json`
//! `--describe-bytes N`  make that so long, with spaces behind it
//! `--describe-at URL` redirect who asks for it
//!
//! Paths: `/`, `/pid`, `/headers`, `/env`, `/echo` (the body), `/stream?N` (N chunks, one each
//! 20 ms), `/slow?MS`, `/hold` (begins an answer, and ends it after the next `/release`),
//! `/print?TEXT`, `/heal`, `/break`, `/exit?CODE`, `/drop` (closes without an answer), `/status?CODE`, and any path with `Upgrade:` (echoes bytes).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, exit};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

static HEALTHY: AtomicBool = AtomicBool::new(true);
static ANSWERED: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Default)]
struct Options {
    text: String,
    port: Option<u16>,
    exit_after: Option<u64>,
    slow_start: u64,
    silent: bool,
    print: u64,
    print_every: Option<u64>,
    child: bool,
    described: Option<String>,
    description_bytes: usize,
    described_at: Option<String>,
}

fn main() {
    let mut options = Options {
        text: "hello".into(),
        ..Options::default()
    };
    let all: Vec<String> = std::env::args().skip(1).collect();
    let mut args = all.iter().cloned();
    while let Some(flag) = args.next() {
        let mut value = || args.next().expect("the flag needs a value");
        match flag.as_str() {
            "--text" => options.text = value(),
            "--port" => options.port = Some(value().parse().expect("a port")),
            "--exit" => {
                eprintln!("exiting as told");
                exit(value().parse().expect("a code"));
            }
            "--exit-after" => options.exit_after = Some(value().parse().expect("a number")),
            "--slow-start" => options.slow_start = value().parse().expect("milliseconds"),
            "--silent" => options.silent = true,
            "--unhealthy" => HEALTHY.store(false, SeqCst),
            "--print" => options.print = value().parse().expect("a number"),
            "--print-every" => options.print_every = Some(value().parse().expect("milliseconds")),
            "--child" => options.child = true,
            "--describe" => options.described = Some(value()),
            "--describe-bytes" => options.description_bytes = value().parse().expect("a number"),
            "--describe-at" => options.described_at = Some(value()),
            "--ignore-term" => {
                // An ignored signal stays ignored over exec.
                let rest = all.iter().filter(|a| *a != "--ignore-term");
                let error = Command::new("/bin/sh")
                    .args(["-c", r#"trap "" TERM; exec "$0" "$@""#])
                    .arg(std::env::current_exe().expect("own path"))
                    .args(rest)
                    .exec();
                panic!("{error}");
            }
            other => {
                eprintln!("unknown flag {other}");
                exit(2);
            }
        }
    }
    run(options);
}

fn run(options: Options) {
    for n in 1..=options.print {
        if n % 2 == 0 {
            println!("line {n}");
        } else {
            eprintln!("line {n}");
        }
    }
    if options.child {
        // `setsid` leaves the process group; the variables stay.
        let child = Command::new("setsid").args(["sleep", "1000"]).spawn();
        println!("child {}", child.map_or(0, |c| c.id()));
    }
    if let Some(every) = options.print_every {
        std::thread::spawn(move || {
            for n in 1u64.. {
                println!("tick {n}");
                std::thread::sleep(Duration::from_millis(every));
            }
        });
    }
    std::thread::sleep(Duration::from_millis(options.slow_start));
    if options.silent {
        loop {
            std::thread::sleep(Duration::from_secs(1000));
        }
    }
    let port = options.port.unwrap_or_else(|| {
        std::env::var("PORT")
            .ok()
            .and_then(|p| p.parse().ok())
            .unwrap_or(8080)
    });
    let listener = match TcpListener::bind(("127.0.0.1", port)) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("cannot listen on port {port}: {error}");
            exit(1);
        }
    };
    println!("listening on {port}");
    for stream in listener.incoming().flatten() {
        let options = options.clone();
        std::thread::spawn(move || {
            let _ = serve(stream, &options);
        });
    }
}

/// How often `/release` was asked for.
static RELEASES: (Mutex<u64>, Condvar) = (Mutex::new(0), Condvar::new());

fn chunk(writer: &mut TcpStream, text: &str) -> std::io::Result<()> {
    write!(writer, "{:x}\r\n{text}\r\n", text.len())
}

fn serve(stream: TcpStream, options: &Options) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut request_line = String::new();
        if reader.read_line(&mut request_line)? == 0 {
            return Ok(());
        }
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_owned();
            if line.is_empty() {
                break;
            }
            headers.push(line);
        }
        let header = |name: &str| {
            headers.iter().find_map(|h| {
                let (n, v) = h.split_once(':')?;
                n.eq_ignore_ascii_case(name).then(|| v.trim().to_owned())
            })
        };
        let target = request_line.split(' ').nth(1).unwrap_or("/").to_owned();
        let head_only = request_line.starts_with("HEAD ");
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        if header("upgrade").is_some() {
            writer.write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            )?;
            let mut buffer = [0; 4096];
            loop {
                let n = reader.read(&mut buffer)?;
                if n == 0 {
                    return Ok(());
                }
                writer.write_all(&buffer[..n])?;
            }
        }
        let body = if header("transfer-encoding").is_some() {
            read_chunked(&mut reader)?
        } else {
            let length = header("content-length").and_then(|l| l.parse().ok());
            let mut body = vec![0; length.unwrap_or(0)];
            reader.read_exact(&mut body)?;
            body
        };
        let mut status = 200;
        let mut more = String::new();
        let answer: Vec<u8> = match path {
            "/" | "/healthz" => {
                if !HEALTHY.load(SeqCst) {
                    status = 503;
                }
                options.text.clone().into_bytes()
            }
            "/pid" => std::process::id().to_string().into_bytes(),
            "/headers" => format!("{request_line}{}\n", headers.join("\n")).into_bytes(),
            "/env" => std::env::vars()
                .map(|(k, v)| format!("{k}={v}\n"))
                .collect::<String>()
                .into_bytes(),
            "/openapi.json" if options.described_at.is_some() => {
                println!("asked for a description");
                status = 302;
                let url = options.described_at.as_deref().unwrap_or_default();
                more = format!("Location: {url}\r\n");
                Vec::new()
            }
            "/openapi.json" if options.described.is_some() => {
                println!("asked for a description");
                let title = options.described.clone().unwrap_or_default();
                let title = title.replace('\\', "\\\\").replace('"', "\\\"");
                let info = format!(r#"{{"title":"{title}","version":"1"}}"#);
                let mut document =
                    format!(r#"{{"openapi":"3.1.0","info":{info},"paths":{{}}}}"#).into_bytes();
                let bytes = document.len().max(options.description_bytes);
                document.resize(bytes, b' ');
                document
            }
            "/echo" => body,
            "/stream" => {
                writer.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                for n in 0..query.parse::<u64>().unwrap_or(3) {
                    chunk(&mut writer, &format!("{}-{n}\n", options.text))?;
                    std::thread::sleep(Duration::from_millis(20));
                }
                writer.write_all(b"0\r\n\r\n")?;
                continue;
            }
            "/hold" => {
                let (releases, released) = &RELEASES;
                let before = *releases.lock().expect("nobody panics with it");
                writer.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                chunk(&mut writer, &format!("{} holds\n", options.text))?;
                let releases = releases.lock().expect("nobody panics with it");
                drop(released.wait_while(releases, |now| *now == before));
                chunk(&mut writer, &format!("{} ends\n", options.text))?;
                writer.write_all(b"0\r\n\r\n")?;
                continue;
            }
            "/release" => {
                let (releases, released) = &RELEASES;
                *releases.lock().expect("nobody panics with it") += 1;
                released.notify_all();
                b"released".to_vec()
            }
            "/slow" => {
                std::thread::sleep(Duration::from_millis(query.parse().unwrap_or(100)));
                options.text.clone().into_bytes()
            }
            "/print" => {
                println!("{query}");
                b"printed".to_vec()
            }
            "/heal" | "/break" => {
                HEALTHY.store(path == "/heal", SeqCst);
                path.as_bytes().to_vec()
            }
            "/exit" => exit(query.parse().unwrap_or(1)),
            "/drop" => return Ok(()),
            "/status" => {
                status = query.parse().unwrap_or(500);
                b"as asked".to_vec()
            }
            _ => {
                status = 404;
                b"no such path".to_vec()
            }
        };
        write!(
            writer,
            "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nX-Text: {}\r\n{more}\r\n",
            answer.len(),
            options.text
        )?;
        if !head_only {
            writer.write_all(&answer)?;
        }
        let answered = ANSWERED.fetch_add(1, SeqCst) + 1;
        if options.exit_after.is_some_and(|n| answered >= n) {
            eprintln!("enough requests");
            exit(3);
        }
        if header("connection").is_some_and(|c| c.eq_ignore_ascii_case("close")) {
            return Ok(());
        }
    }
}

fn read_chunked(reader: &mut impl BufRead) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut size = String::new();
        reader.read_line(&mut size)?;
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk)?;
        if size == 0 {
            return Ok(body);
        }
        body.extend_from_slice(&chunk[..size]);
    }
}
