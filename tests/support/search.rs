//! Searching whatever a server leaves behind for what must not be there.

use std::fs;
use std::path::Path;
use std::process::Command;

use aho_corasick::AhoCorasick;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use reqwest::Method;

use super::http::request;
use super::process::Done;
use super::server::Server;

/// The forms of a text that give it away.
fn forms(text: &str) -> Vec<Vec<u8>> {
    let json = serde_json::to_string(text).unwrap();
    let json = json[1..json.len() - 1].to_owned();
    let percent: String = text
        .bytes()
        .map(|b| match b {
            b if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect();
    let hex: String = text.bytes().map(|b| format!("{b:02x}")).collect();
    let mut all = vec![text.to_owned(), json, percent, hex];
    for before in ["", ".", ".."] {
        let whole = format!("{before}{text}");
        // Characters that what stands before and behind it has no part in.
        let (from, to) = ((8 * before.len()).div_ceil(6), 8 * whole.len() / 6);
        all.push(STANDARD.encode(&whole)[from..to].to_owned());
        all.push(URL_SAFE.encode(&whole)[from..to].to_owned());
    }
    all.into_iter().map(String::into_bytes).collect()
}

/// Looks for canaries, and remembers where it looked.
pub struct Search {
    /// Which canary each pattern of `forms` is one of.
    texts: Vec<&'static str>,
    forms: AhoCorasick,
    seen: usize,
    found: Vec<String>,
}

impl Search {
    /// Looks for these, in all their forms.
    pub fn new(texts: impl IntoIterator<Item = &'static str>) -> Self {
        let (texts, forms): (Vec<_>, Vec<_>) = texts
            .into_iter()
            .flat_map(|t| forms(t).into_iter().map(move |f| (t, f)))
            .unzip();
        Self {
            texts,
            forms: AhoCorasick::new(forms).unwrap(),
            seen: 0,
            found: Vec::new(),
        }
    }

    /// Looks at some bytes; the place is named if they have one.
    pub fn look(&mut self, place: &str, bytes: &[u8]) {
        self.seen += 1;
        if let Some(found) = self.forms.find(bytes) {
            let from = found.start().saturating_sub(60);
            let to = (found.end() + 20).min(bytes.len());
            let around = String::from_utf8_lossy(&bytes[from..to]);
            let text = self.texts[found.pattern().as_usize()];
            self.found
                .push(format!("{text:?} is in {place}: {around:?}"));
        }
    }

    /// Looks at all files below a folder but those of one, and into those that are compressed.
    /// What is taken away meanwhile is passed over.
    pub fn look_in(&mut self, folder: &Path, except: &Path) {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            let Ok(kind) = fs::symlink_metadata(&path).map(|m| m.file_type()) else {
                continue;
            };
            if path == except || kind.is_symlink() {
                continue;
            }
            if kind.is_dir() {
                self.look_in(&path, except);
            } else if kind.is_file() {
                let bytes = fs::read(&path).unwrap_or_default();
                let place = path.display().to_string();
                self.look(&place, &bytes);
                if bytes.starts_with(&[0x1f, 0x8b]) {
                    let unpacked = Command::new("gzip").arg("-dc").arg(&path).output();
                    self.look(&format!("{place}, unpacked"), &unpacked.unwrap().stdout);
                }
            }
        }
    }

    /// Whether nothing was found so far.
    pub fn is_clean(&self) -> bool {
        self.found.is_empty()
    }

    /// Looks at what a command printed.
    pub fn look_at(&mut self, what: &str, done: &Done) {
        self.look(&format!("stdout of {what}"), done.stdout.as_bytes());
        self.look(&format!("stderr of {what}"), done.stderr.as_bytes());
    }

    /// Looks at everything that can be asked of a server, about a deployment of
    /// `shop.production.web`, and at what it answers to whoever shows a credential that it may not
    /// know.
    pub fn look_at_answers(&mut self, server: &Server, deployment: &str, authorization: &str) {
        let document = server.read("/openapi.json");
        let paths = document["paths"].as_object().unwrap();
        let mut asked = 0;
        for (path, operations) in paths {
            if operations.get("get").is_none() || path.starts_with("/git/") {
                continue;
            }
            let path = path
                .replace("{project}", "shop")
                .replace("{environment}", "production")
                .replace("{service}", "web")
                .replace("{instance}", "shop.production.web")
                .replace("{position}", "5")
                .replace("{id}", deployment);
            let url = format!("{}{path}", server.url());
            for headers in [&[("Authorization", authorization)][..], &[]] {
                let answer = request(Method::GET, &url, headers, None).unwrap();
                self.look(&format!("GET {path}"), format!("{answer:?}").as_bytes());
                self.look(&format!("GET {path}"), answer.body.as_bytes());
                asked += u32::from(answer.status == 200);
            }
        }
        assert!(asked > 10, "{asked} answers");
        for event in server.events() {
            self.look("an event", event.to_string().as_bytes());
        }
    }

    /// Says what became of it; a search that looked at next to nothing has proven nothing.
    #[track_caller]
    pub fn found_nothing(self, at_least: usize) {
        assert_eq!(self.found, Vec::<String>::new());
        assert!(self.seen >= at_least, "looked at {} places only", self.seen);
    }
}
