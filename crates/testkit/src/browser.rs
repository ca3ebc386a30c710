//! A real browser, driven by the Chrome DevTools Protocol over a pair of pipes.

#![allow(
    clippy::unwrap_used,
    reason = "a test whose browser does not work has failed"
)]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long the browser may take for one answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long anything may take that is waited for in the page.
const SHOWN_WITHIN: Duration = Duration::from_secs(90);

/// What the page has fetched so far, with what came from the browser's own memory as nothing.
const FETCHED: &str = "[...performance.getEntriesByType('navigation'),
    ...performance.getEntriesByType('resource')].map((e) => ({
        url: e.name, sent: e.transferSize, encoded: e.encodedBodySize, decoded: e.decodedBodySize,
    }))";

/// When it painted something of the content first, in milliseconds, or nothing.
const PAINTED: &str = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime";

/// One answer that the page has fetched. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Where from.
    pub url: String,
    /// All that came over the line: the head, and the body as it was encoded.
    pub sent: u64,
    /// The body as it was encoded.
    pub encoded: u64,
    /// The body as it was meant.
    pub decoded: u64,
}

/// Chromium with one page. It ends with this.
#[derive(Debug)]
pub struct Browser {
    process: Child,
    orders: File,
    answers: Receiver<Value>,
    session: String,
    number: u64,
    /// What the page complained of: its own errors, and what its policy has kept it from.
    complaints: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Browser {
    /// Starts it at an address, in a window of so many pixels, with nothing in its memory; none, after
    /// saying so, where there is no Chromium.
    ///
    /// # Panics
    /// If it does not start.
    pub fn open(url: &str, (width, height): (u32, u32)) -> Option<Self> {
        let Some(program) = std::env::var_os("DAYBOOK_CHROMIUM").filter(|p| !p.is_empty()) else {
            crate::left_out("no Chromium: DAYBOOK_CHROMIUM names none");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let [orders, answers] = ["orders", "answers"].map(|name| folder.path().join(name));
        for pipe in [&orders, &answers] {
            let made = Command::new("mkfifo").arg(pipe).status().unwrap();
            assert!(made.success());
        }
        // It reads orders from descriptor 3 and writes answers to 4. Tests run as root, too, for whom
        // it has no sandbox.
        let script = r#"exec "$0" "$@" 3<"$ORDERS" 4>"$ANSWERS""#;
        let process = Command::new("/bin/sh")
            .args(["-c", script])
            .arg(program)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu"])
            .args(["--disable-dev-shm-usage", "--hide-scrollbars"])
            .args(["--no-first-run", "--disable-background-networking"])
            .arg("--remote-debugging-pipe")
            .arg(format!("--window-size={width},{height}"))
            .arg(format!(
                "--user-data-dir={}",
                folder.path().join("profile").display()
            ))
            .arg("about:blank")
            .env("ORDERS", &orders)
            .env("ANSWERS", &answers)
            .env("HOME", folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Opening a pipe waits for its other end.
        let orders = File::options().write(true).open(orders).unwrap();
        let mut incoming = BufReader::new(File::open(answers).unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while incoming.read_until(0, &mut message).is_ok_and(|n| n > 1) {
                message.pop();
                if sender
                    .send(serde_json::from_slice(&message).unwrap())
                    .is_err()
                {
                    return;
                }
                message.clear();
            }
        });
        let mut browser = Self {
            process,
            orders,
            answers,
            session: String::new(),
            number: 0,
            complaints: Vec::new(),
            _folder: folder,
        };
        let page = browser.order("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": page["targetId"], "flatten": true });
        let session = browser.order("Target.attachToTarget", attach);
        browser.session = session["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log"] {
            browser.order(&format!("{domain}.enable"), json!({}));
        }
        // A window is never narrower than 500 pixels, a phone is.
        let size = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false,
        });
        browser.order("Emulation.setDeviceMetricsOverride", size);
        // Somebody looks at it, and types.
        browser.order(
            "Emulation.setFocusEmulationEnabled",
            json!({ "enabled": true }),
        );
        browser.order("Page.navigate", json!({ "url": url }));
        Some(browser)
    }

    fn order(&mut self, method: &str, parameters: Value) -> Value {
        self.number += 1;
        let mut order = json!({ "id": self.number, "method": method, "params": parameters });
        if !self.session.is_empty() {
            order["sessionId"] = self.session.clone().into();
        }
        let mut bytes = order.to_string().into_bytes();
        bytes.push(0);
        self.orders.write_all(&bytes).unwrap();
        loop {
            let answer = self.answers.recv_timeout(PATIENCE);
            let answer = answer.unwrap_or_else(|_| panic!("no answer to {order}"));
            if answer["id"] == self.number {
                // The page that was asked is gone: another one comes, and whoever waits asks again.
                if answer["error"]["message"] == "Inspected target navigated or closed" {
                    return Value::Null;
                }
                assert!(answer["error"].is_null(), "{order}: {answer}");
                return answer["result"].clone();
            }
            self.hear(&answer);
        }
    }

    fn hear(&mut self, event: &Value) {
        let text = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => &event["params"]["exceptionDetails"],
            Some("Log.entryAdded") if event["params"]["entry"]["level"] == "error" => {
                &event["params"]["entry"]
            }
            _ => return,
        };
        self.complaints.push(text.to_string());
    }

    /// What an expression of the page comes to.
    ///
    /// # Panics
    /// If it throws, as all below if what they wait for does not come.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let parameters = json!({
            "expression": expression, "awaitPromise": true, "returnByValue": true,
        });
        let result = self.order("Runtime.evaluate", parameters);
        assert!(
            result["exceptionDetails"].is_null(),
            "{expression}: {result}"
        );
        result["result"]["value"].clone()
    }

    /// Whether its reader prefers dark colours.
    pub fn prefers_dark(&mut self, dark: bool) {
        let value = if dark { "dark" } else { "light" };
        let feature = json!({ "name": "prefers-color-scheme", "value": value });
        self.order(
            "Emulation.setEmulatedMedia",
            json!({ "features": [feature] }),
        );
    }

    /// What of the page keeps people from it, by the rules of axe-core: what is serious, or worse.
    pub fn barriers(&mut self, axe: &str) -> Value {
        if self.evaluate("typeof axe") == "undefined" {
            self.evaluate(&format!("{axe}; 1"));
        }
        self.evaluate(
            "axe.run(document, { resultTypes: ['violations'] }).then(({ violations }) =>
                violations.filter((v) => ['serious', 'critical'].includes(v.impact)).map((v) =>
                    `${v.id}: ${v.nodes.map((n) => n.html + ' ' + n.failureSummary).join('; ')}`))",
        )
    }

    /// What the page has fetched so far. Streams are not in it while they are open.
    pub fn fetched(&mut self) -> Vec<Fetched> {
        let all = self.evaluate(FETCHED);
        let all = all.as_array().unwrap().iter();
        let size = |of: &Value| of.as_u64().unwrap();
        all.map(|one| Fetched {
            url: one["url"].as_str().unwrap().to_owned(),
            sent: size(&one["sent"]),
            encoded: size(&one["encoded"]),
            decoded: size(&one["decoded"]),
        })
        .collect()
    }

    /// How long it took from the beginning of the navigation until something of the content was painted,
    /// once it is.
    #[track_caller]
    pub fn painted(&mut self) -> Duration {
        let millis = until("something is painted", || self.evaluate(PAINTED).as_f64());
        Duration::from_secs_f64(millis / 1000.0)
    }

    /// A picture of the whole page, as PNG.
    pub fn screenshot(&mut self) -> Vec<u8> {
        use base64::Engine as _;
        let size = self.order("Page.getLayoutMetrics", json!({}))["cssContentSize"].clone();
        let clip = json!({
            "x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1,
        });
        let asked = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let taken = self.order("Page.captureScreenshot", asked);
        base64::engine::general_purpose::STANDARD
            .decode(taken["data"].as_str().unwrap())
            .unwrap()
    }

    /// Fills a field in, as somebody who types does, waiting until it is there.
    #[track_caller]
    pub fn fill(&mut self, selector: &str, value: &str) {
        let expression = format!(
            "(() => {{ const field = document.querySelector({}); if (!field) return false;
                field.value = {};
                for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {{ bubbles: true }}));
                return true; }})()",
            json!(selector),
            json!(value)
        );
        until(&format!("{selector} can be filled in"), || {
            (self.evaluate(&expression) == true).then_some(())
        });
    }

    /// Waits until an expression of the page is true.
    #[track_caller]
    pub fn holds(&mut self, expression: &str) {
        until(&format!("it holds that {expression}"), || {
            (self.evaluate(expression) == true).then_some(())
        });
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            _ => 0,
        };
        let text = if key == "Enter" { "\r" } else { "" };
        // A key that types nothing is pressed in the raw.
        let down = if text.is_empty() {
            "rawKeyDown"
        } else {
            "keyDown"
        };
        for kind in [down, "keyUp"] {
            let mut event = json!({
                "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code,
            });
            if kind == "keyDown" {
                event["text"] = text.into();
            }
            self.order("Input.dispatchKeyEvent", event);
        }
    }

    /// Waits until the page shows a text.
    #[track_caller]
    pub fn shows(&mut self, text: &str) {
        let expression = format!("document.body?.innerText.includes({})", json!(text));
        until(&format!("the page shows {text:?}"), || {
            (self.evaluate(&expression) == true).then_some(())
        });
    }

    /// Clicks what has this text, waiting until it is there.
    #[track_caller]
    pub fn click(&mut self, selector: &str, text: &str) {
        let expression = format!(
            "(() => {{ const found = [...document.querySelectorAll({})]
                .find((e) => e.textContent.trim() === {}); found?.click(); return !!found; }})()",
            json!(selector),
            json!(text)
        );
        until(&format!("{selector} {text:?} can be clicked"), || {
            (self.evaluate(&expression) == true).then_some(())
        });
    }

    /// What it complained of so far.
    pub fn complaints(&mut self) -> &[String] {
        // An answer comes after everything that was said before it.
        self.evaluate("1");
        &self.complaints
    }
}

/// Waits until there is an answer.
#[track_caller]
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SHOWN_WITHIN;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
