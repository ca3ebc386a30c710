//! A real browser, driven by the Chrome DevTools Protocol over a pair of pipes.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};

use super::server::until;

/// How long the browser may take for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Chromium with one page. It ends with this.
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
    /// Starts it at an address; none, after saying so, where there is no Chromium.
    pub fn open(url: &str, (width, height): (u32, u32)) -> Option<Self> {
        let Some(program) = std::env::var_os("DAYBOOK_CHROMIUM").filter(|p| !p.is_empty()) else {
            daybook_testkit::left_out("no Chromium: DAYBOOK_CHROMIUM names none");
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

    /// Keeps a picture of the whole page for people to look at, below the tests' own folder.
    pub fn picture(&mut self, name: &str) {
        use base64::Engine as _;
        let size = self.order("Page.getLayoutMetrics", json!({}))["cssContentSize"].clone();
        let clip = json!({
            "x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1,
        });
        let asked = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let taken = self.order("Page.captureScreenshot", asked);
        let png = base64::engine::general_purpose::STANDARD
            .decode(taken["data"].as_str().unwrap())
            .unwrap();
        let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{name}.png")), png).unwrap();
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

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
