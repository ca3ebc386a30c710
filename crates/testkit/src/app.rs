//! The application that tests run, as a process.

use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Path of a small web application that answers HTTP and misbehaves on request. Its flags and
/// paths are described in `app/testapp.rs`.
pub const TESTAPP: &str = env!("DAYBOOK_TESTAPP");

/// A running test application, killed when dropped.
#[derive(Debug)]
pub struct TestApp {
    /// Where it answers.
    pub addr: SocketAddr,
    child: Child,
}

impl TestApp {
    /// Starts one with these flags on a free port, and waits until it listens.
    ///
    /// # Panics
    /// If it does not listen within half a minute.
    pub fn start(flags: &[&str]) -> Self {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            // Somebody else may take the port before the application does: then another.
            if let Some(app) = Self::start_on(crate::free_addr(), flags) {
                return app;
            }
            assert!(Instant::now() < deadline, "the application does not start");
        }
    }

    /// Starts one at this address, and waits until it listens; `None` if it ends instead.
    ///
    /// # Panics
    /// If it does neither within half a minute.
    pub fn start_on(addr: SocketAddr, flags: &[&str]) -> Option<Self> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut child = Command::new(TESTAPP)
            .args(flags)
            .env("PORT", addr.port().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the test application was built");
        while child
            .try_wait()
            .expect("a child can be waited for")
            .is_none()
        {
            if TcpStream::connect(addr).is_ok() {
                return Some(Self { addr, child });
            }
            assert!(Instant::now() < deadline, "the application does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        self.kill();
    }
}
