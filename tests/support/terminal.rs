//! A terminal that commands print to.

use std::fs::File;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A command that prints to a terminal of its own. It is killed when dropped.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    shown: Arc<Mutex<Vec<u8>>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Terminal {
    /// Starts a command whose output is a terminal with this many columns.
    pub fn start(mut command: Command, columns: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let end = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap();
        let size = Winsize {
            ws_row: 40,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&end, size).unwrap();
        let child = command
            .env("TERM", "xterm")
            .env_remove("NO_COLOR")
            .stdout(Stdio::from(end))
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts");
        // The command holds the other end, too: what is read ends with the last of them.
        drop(command);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let into = shown.clone();
        let reader = std::thread::spawn(move || {
            let mut ours = File::from(ours);
            let mut bytes = [0; 4096];
            // A terminal whose other end is closed fails to be read.
            while let Ok(count @ 1..) = ours.read(&mut bytes) {
                into.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Self {
            child,
            shown,
            reader: Some(reader),
        }
    }

    /// All that was printed up to now, escape sequences included.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    /// All that was printed, once the command has ended well.
    #[track_caller]
    pub fn ended(mut self) -> String {
        let status = self.child.wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        let shown = self.shown();
        assert!(status.success(), "{status}: {shown}");
        shown
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The text between colours.
///
/// # Panics
/// If there is any escape sequence that is no whole colour.
#[track_caller]
pub fn without_colours(shown: &str) -> String {
    let mut parts = shown.split('\x1b');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.strip_prefix('[').and_then(|rest| rest.split_once('m'));
        let (code, rest) = code.unwrap_or_else(|| panic!("a broken colour: {part:?}"));
        let whole = code.bytes().all(|b| b.is_ascii_digit() || b == b';');
        assert!(whole, "a broken colour: {part:?}");
        text.push_str(rest);
    }
    text
}
