//! Asks an address again and again while something else happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use reqwest::Method;

use super::http::request;
use super::server::Server;

/// Somebody who uses a service all the time.
#[derive(Debug)]
pub struct Visitor {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<(u32, Vec<String>)>>,
}

impl Visitor {
    /// Visits `/` at a host through a server's gateway; each answer must be this text.
    pub fn of(server: &Server, host: &str, text: &str) -> Self {
        Self::of_any(server, host, &[text])
    }

    /// The same where each answer must be one of these texts.
    pub fn of_any(server: &Server, host: &str, texts: &[&str]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, url) = (stop.clone(), server.gateway());
        let texts: Vec<String> = texts.iter().map(|t| (*t).to_owned()).collect();
        let host = host.to_owned();
        let thread = std::thread::spawn(move || {
            let (mut served, mut wrong) = (0, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                match request(Method::GET, &url, &[("Host", &host)], None) {
                    Ok(answer) if answer.status == 200 && texts.contains(&answer.body) => {
                        served += 1
                    }
                    other => wrong.push(format!("{other:?}")),
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            (served, wrong)
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends the visits.
    ///
    /// # Panics
    /// If one of them was not served, or there were none.
    #[track_caller]
    pub fn was_always_served(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let (served, wrong) = self.thread.take().unwrap().join().unwrap();
        assert_eq!(wrong, Vec::<String>::new(), "beside {served} good answers");
        assert!(served > 0);
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
