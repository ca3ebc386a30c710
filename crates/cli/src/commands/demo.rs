//! `daybook demo`: the whole job, on a real repository, with real parts, in a folder of its own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::deploy::{Follow, follow};
use super::{Outcome, ServerArgs, replay};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::node::{Node, NodeOptions};
use crate::output;

/// Show the whole job in a folder of its own.
///
/// Makes a small repository (or clones yours), deploys it, deploys a second version beside it,
/// switches, rolls back, and replays the ledger to show that all of it is recorded. Nothing
/// outside the folder is touched, and everything is stopped at the end.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Deploy this repository instead of the small one that the demo makes.
    #[arg(long, value_name = "URL")]
    repo: Option<String>,
    /// The ref to deploy first, with --repo.
    #[arg(
        long = "ref",
        value_name = "REF",
        requires = "repo",
        default_value = "HEAD"
    )]
    git_ref: String,
    /// The ref to deploy second, with --repo; the first one again if not given.
    #[arg(long, value_name = "REF", requires = "repo")]
    second_ref: Option<String>,
    /// Keep everything in this folder afterwards; it must be empty or not exist.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Use this NATS server for the log instead of the embedded one.
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
}

const INSTANCE: &str = "shop.production.web";

pub async fn run(args: DemoArgs) -> Outcome {
    let begun = Instant::now();
    let temporary;
    let folder = match &args.keep {
        Some(dir) => {
            let used = std::fs::read_dir(dir).is_ok_and(|mut d| d.next().is_some());
            if used {
                return Err(Failure::new(
                    Code::Usage,
                    "folder_not_empty",
                    format!("{} is not empty", dir.display()),
                )
                .hint("name an empty or a new folder"));
            }
            std::fs::create_dir_all(dir)?;
            dir.clone()
        }
        None => {
            temporary = tempfile::Builder::new().prefix("daybook-demo-").tempdir()?;
            temporary.path().to_owned()
        }
    };
    let (source, first, second) = match &args.repo {
        Some(url) => {
            let second = args
                .second_ref
                .clone()
                .unwrap_or_else(|| args.git_ref.clone());
            (url.clone(), args.git_ref.clone(), second)
        }
        None => {
            let repository = folder.join("source");
            sample(&repository, 1)?;
            (
                repository.display().to_string(),
                "main".into(),
                "main".into(),
            )
        }
    };
    let mut options = NodeOptions::everything(folder.join("data"));
    options.listen = "127.0.0.1:0".parse().expect("an address");
    options.gateway = "127.0.0.1:0".parse().expect("an address");
    options.nats = args.nats.clone();
    let node = Node::start(options).await?;
    let show = Show {
        client: Client::with_token(&ServerArgs::of(node.api_url(), Some("ada".into())), None)?,
        gateway: node.gateway_url().unwrap_or_default(),
        http: reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(10))
            .build()
            .map_err(|e| Failure::new(Code::Failure, "http_client", e.to_string()))?,
    };
    let told = show.tell(&args, &folder, &source, &first, &second).await;
    node.shutdown(true).await;
    told?;
    if !output::is_json() {
        let style = output::style();
        output::line("");
        output::line(&style.good(&format!(
            "Done in {:.1} s. Run it for yourself with `daybook up`.",
            begun.elapsed().as_secs_f64()
        )));
        if let Some(dir) = &args.keep {
            output::line(&format!("Everything is kept in {}.", dir.display()));
        }
    }
    Ok(Code::Success)
}

struct Show {
    client: Client,
    gateway: String,
    http: reqwest::Client,
}

impl Show {
    async fn tell(
        &self,
        args: &DemoArgs,
        folder: &Path,
        source: &str,
        first: &str,
        second: &str,
    ) -> Result<(), Failure> {
        self.title("A project, a service with its repository, and an environment on two clusters");
        self.command("daybook project create shop");
        self.client
            .post(
                "/api/v1/projects",
                &json!({ "name": "shop", "description": "Daybook's demo" }),
            )
            .await?;
        self.command(&format!("daybook service create shop web --repo {source}"));
        let service = json!({ "source": { "url": source, "default_ref": first } });
        let path = "/api/v1/projects/shop/services/web";
        let _: Value = self
            .client
            .command(reqwest::Method::PUT, path, &service, None)
            .await?;
        self.command("daybook env create shop production --cluster local-a --cluster local-b");
        let environment = json!({
            "name": "production", "clusters": ["local-a", "local-b"], "live": true, "switch": "automatic",
        });
        self.client
            .post("/api/v1/projects/shop/environments", &environment)
            .await?;

        self.title("The first version: clone, build, commit, sync, start, switch");
        self.command(&format!("daybook deploy {INSTANCE} --ref {first}"));
        let one = self.deploy(first, "automatic").await?;
        let before = self.ask("web.shop.localhost").await?;

        self.title("The second version, beside the first: traffic stays where it is");
        if args.repo.is_none() {
            self.command("git commit -am 'A new greeting'");
            sample(Path::new(source), 2)?;
        }
        self.command(&format!(
            "daybook deploy {INSTANCE} --ref {second} --no-switch"
        ));
        let two = self.deploy(second, "manual").await?;
        let main = self.ask("web.shop.localhost").await?;
        self.expect(
            main == before,
            "the main address changed although nothing was switched",
        )?;
        let preview = self.preview_host(&two).await?;
        self.ask(&preview).await?;

        self.title("Switch: the second version takes the traffic of the service");
        self.command(&format!("daybook mark-main {}", tail(&two)));
        let answer = self
            .client
            .post(&format!("/api/v1/deployments/{two}/mark-main"), &json!({}))
            .await?;
        self.expect(
            answer.get("previous_main").and_then(Value::as_str) == Some(&one),
            "the deployment before was not named",
        )?;
        self.ask_until("web.shop.localhost", &two).await?;

        self.title("Roll back: the first version, still running, takes it back");
        self.command(&format!(
            "daybook rollback {INSTANCE} --reason 'the greeting is too loud'"
        ));
        let body = json!({ "instance_id": INSTANCE, "reason": "the greeting is too loud" });
        let answer = self.client.post("/api/v1/rollback", &body).await?;
        self.expect(
            answer.get("id").and_then(Value::as_str) == Some(&one),
            "it was not the first version that was gone back to",
        )?;
        let after = self.ask_until("web.shop.localhost", &one).await?;
        self.expect(after == before, "the first version answers differently now")?;

        self.title("What runs where, and how it came to be");
        self.command("daybook status");
        self.print_state().await?;
        self.command("daybook history");
        self.print_history().await?;
        self.command("git log --oneline   (in the GitOps repository, cloned from the server)");
        self.print_gitops(folder)?;

        self.title("The ledger, replayed: fold it anew, and compare with what the server says");
        self.command("daybook replay");
        replay::compare(&self.client, true).await?;
        Ok(())
    }

    fn title(&self, text: &str) {
        if !output::is_json() {
            output::line("");
            output::line(&output::style().bold(&format!("── {text}")));
        }
    }

    fn command(&self, text: &str) {
        if !output::is_json() {
            output::line(&format!("{} {text}", output::style().dim("$")));
        }
    }

    fn expect(&self, holds: bool, otherwise: &str) -> Result<(), Failure> {
        if holds {
            Ok(())
        } else {
            Err(Failure::new(Code::Failure, "demo_failed", otherwise).hint(
                "this is a defect of Daybook; run the demo with -v and report what it prints",
            ))
        }
    }

    async fn deploy(&self, git_ref: &str, switch: &str) -> Result<String, Failure> {
        let body = json!({ "instance_id": INSTANCE, "version": git_ref, "switch": switch });
        let answer = self.client.post("/api/v1/deployments", &body).await?;
        let id = answer
            .get("id")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        match follow(&self.client, &id, Follow::Deployment).await? {
            Code::Success => Ok(id),
            code => Err(Failure::new(
                code,
                "demo_failed",
                format!("deployment {id} did not become live"),
            )),
        }
    }

    async fn preview_host(&self, id: &str) -> Result<String, Failure> {
        let detail: Value = self
            .client
            .get(&format!("/api/v1/deployments/{id}"), &[])
            .await?;
        detail
            .get("hostnames")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .find(|h| h.get("stickiness").and_then(Value::as_str) == Some("deployment"))
            .and_then(|h| h.get("hostname").and_then(Value::as_str))
            .map(str::to_owned)
            .ok_or_else(|| {
                Failure::new(
                    Code::Failure,
                    "demo_failed",
                    "the deployment has no preview address",
                )
            })
    }

    /// Asks an address through the gateway, as a browser would.
    async fn get(&self, host: &str) -> Result<(String, String), Failure> {
        let answer = self
            .http
            .get(format!("{}/", self.gateway))
            .header("Host", host)
            .send()
            .await
            .map_err(|e| {
                Failure::new(
                    Code::Failure,
                    "demo_failed",
                    format!("{host} does not answer: {e}"),
                )
            })?;
        let by = answer
            .headers()
            .get("x-daybook-deployment")
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let status = answer.status();
        let body = answer.text().await.unwrap_or_default();
        if !status.is_success() && !status.is_redirection() {
            return Err(Failure::new(
                Code::Failure,
                "demo_failed",
                format!("{host} answers with HTTP status {status}: {body}"),
            ));
        }
        Ok((by, body))
    }

    async fn ask(&self, host: &str) -> Result<(String, String), Failure> {
        let (by, body) = self.get(host).await?;
        self.show(host, &by, &body);
        Ok((by, body))
    }

    /// Asks until this deployment answers: a switch is recorded first, and applied a moment later.
    async fn ask_until(&self, host: &str, id: &str) -> Result<(String, String), Failure> {
        let begun = Instant::now();
        loop {
            let (by, body) = self.get(host).await?;
            if by == id {
                self.show(host, &by, &body);
                return Ok((by, body));
            }
            if begun.elapsed() > Duration::from_secs(10) {
                return Err(Failure::new(
                    Code::Failure,
                    "demo_failed",
                    format!("{host} is still answered by {by}"),
                ));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn show(&self, host: &str, by: &str, body: &str) {
        if output::is_json() {
            return;
        }
        let heading = body
            .split_once("<h1>")
            .and_then(|(_, rest)| rest.split_once("</h1>"))
            .map_or_else(|| body.lines().next().unwrap_or_default(), |(h, _)| h);
        let heading: String = heading.chars().take(70).collect();
        self.command(&format!(
            "curl http://{host}:{}/",
            self.gateway.rsplit(':').next().unwrap_or_default()
        ));
        output::line(&format!(
            "{heading}   {}",
            output::style().dim(&format!("(deployment …{})", tail(by)))
        ));
    }

    async fn print_state(&self) -> Result<(), Failure> {
        super::status::overview(&self.client, &[]).await
    }

    async fn print_history(&self) -> Result<(), Failure> {
        super::history::page(&self.client, &[]).await
    }

    fn print_gitops(&self, folder: &Path) -> Result<(), Failure> {
        let clone = folder.join("gitops-clone");
        let git = |args: &[&str], dir: &Path| {
            std::process::Command::new("git")
                .args(args)
                .current_dir(dir)
                .env("GIT_TERMINAL_PROMPT", "0")
                .output()
        };
        let url = format!("{}/git/shop.git", self.client.base());
        let target = clone.display().to_string();
        match git(&["clone", "--quiet", &url, &target], folder) {
            Ok(done) if done.status.success() => {}
            Ok(done) => {
                return Err(Failure::new(
                    Code::Failure,
                    "demo_failed",
                    format!(
                        "git clone {url}: {}",
                        String::from_utf8_lossy(&done.stderr).trim()
                    ),
                ));
            }
            Err(error) => {
                output::line(&format!("git is not here to clone it: {error}"));
                return Ok(());
            }
        }
        let log = git(&["log", "--pretty=%h %an: %s"], &clone)?;
        if !output::is_json() {
            output::line(String::from_utf8_lossy(&log.stdout).trim_end());
        }
        Ok(())
    }
}

fn tail(id: &str) -> &str {
    id.len().checked_sub(8).map_or(id, |from| &id[from..])
}

/// Makes the small repository, or commits its next version.
fn sample(folder: &Path, version: u32) -> Result<(), Failure> {
    let failed = |e: git2::Error| {
        Failure::new(
            Code::Failure,
            "demo_failed",
            format!("git: {}", e.message()),
        )
    };
    let repository = if version == 1 {
        let mut options = git2::RepositoryInitOptions::new();
        options.initial_head("main");
        git2::Repository::init_opts(folder, &options).map_err(failed)?
    } else {
        git2::Repository::open(folder).map_err(failed)?
    };
    let greeting = if version == 1 {
        "Hello from Daybook"
    } else {
        "HELLO FROM DAYBOOK!"
    };
    let files = [
        (
            "index.html",
            format!(
                "<!doctype html>\n<title>Shop</title>\n<h1>{greeting}</h1>\n<p>Version {version}.</p>\n"
            ),
        ),
        (
            "openapi.json",
            format!(
                "{{\"openapi\":\"3.1.0\",\"info\":{{\"title\":\"Shop\",\"version\":\"{version}.0.0\"}},\"paths\":{{}}}}\n"
            ),
        ),
    ];
    let mut index = repository.index().map_err(failed)?;
    for (name, text) in &files {
        std::fs::write(folder.join(name), text)?;
        index.add_path(Path::new(name)).map_err(failed)?;
    }
    index.write().map_err(failed)?;
    let tree = index
        .write_tree()
        .and_then(|id| repository.find_tree(id))
        .map_err(failed)?;
    let author = git2::Signature::now("Ada", "ada@example.com").map_err(failed)?;
    let parent = repository.head().and_then(|h| h.peel_to_commit()).ok();
    let parents: Vec<_> = parent.iter().collect();
    let message = if version == 1 {
        "A shop with a friendly greeting\n"
    } else {
        "A new greeting\n\nLouder, so that it is heard.\n"
    };
    repository
        .commit(Some("HEAD"), &author, &author, message, &tree, &parents)
        .map_err(failed)?;
    Ok(())
}
