//! The page at `/`, in a real browser.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use daybook_testkit::website::Conduct;
use serde_json::json;

use crate::endpoints::{Edge, HOST, wait_for};
use crate::judged::node;
use crate::support::{
    Browser, Done, Receiver, Server, Settings, application, keep_picture, replace_flags, request,
    until,
};

const INSTANCE: &str = "shop.production.web";

#[test]
fn what_runs_is_shown_switched_and_stopped_without_a_reload() {
    let server = Server::start(Settings::default());
    let Some(mut page) = Browser::open(&server.url(), (1200, 900)) else {
        return;
    };
    page.shows("Nothing yet.");
    // Whatever happens from here on is shown without a reload: this would be gone after one.
    page.evaluate("window.kept = true");

    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    page.shows("web production");
    page.shows("web.shop.localhost");
    for answer in ["build ready", "workload ready", "endpoint ready"] {
        page.shows(answer);
    }
    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &[]);
    let short = |id: &str| id.replace('-', "")[24..].to_owned();

    // The traffic goes back to the first one, by a click, and with a reason.
    page.click("nav a", "Routes");
    page.shows(&format!("Main: {}", short(&second)));
    let button = page.evaluate(&format!(
        "document.getElementById('switch-{first}')?.textContent"
    ));
    page.click("button", button.as_str().unwrap());
    page.evaluate("document.querySelector('dialog input').value = 'as before'");
    page.click("dialog[open] button", "Switch");
    page.shows(&format!("Main: {}", short(&first)));
    let served = server.get_from("web.shop.localhost", "/", &first);
    assert_eq!(served.body, "one");
    assert_eq!(server.deployment(&first)["main"], true);

    // A deployment with its steps, its output, and what can be done to it.
    page.evaluate(&format!("location.hash = '#/deployments/{second}'"));
    page.shows("What happened");
    page.shows("It is live.");
    page.shows("cloning");
    page.click("button", "Stop");
    // The answer is lost, and whoever clicks once more asks for nothing new.
    page.evaluate(
        "window.honest = window.fetch;
         window.keys = [];
         window.fetch = async (url, options) => {
             const answered = await honest(url, options);
             if (options?.method !== 'POST') return answered;
             if (keys.push(options.headers['idempotency-key']) === 1) throw new TypeError('lost');
             return answered;
         }",
    );
    page.click("dialog[open] button", "Stop");
    page.shows("It may have been done");
    page.click("dialog[open] button", "Stop");
    until("the same was sent again", || {
        (page.evaluate("keys.length") == 2).then_some(())
    });
    assert_eq!(page.evaluate("new Set(keys).size"), 1);
    page.evaluate("window.fetch = honest");
    server.wait_for(&second, "stopped");
    page.shows("stopped");
    page.click("button", "Terminate");
    page.click("dialog[open] button", "Leave it");
    assert_eq!(server.deployment(&second)["state"], "stopped");

    // What two deployments differ in.
    page.click("nav a", "History");
    page.shows("Choose two");
    for id in [&first, &second] {
        page.evaluate(&format!("document.getElementById('choose-{id}').click()"));
    }
    page.shows("What changed between them");
    page.shows("image.digest");

    // Every event can be proven, and one whose bytes differ cannot.
    page.evaluate("location.hash = '#/ledger/1'");
    page.shows("In this browser: this event is in the signed ledger");
    let forged = "import('/page/merkle.js').then(async ({ prove }) => {
        const bytes = async (path) => {
            const all = new Uint8Array(await (await fetch(`/tlog/${path}`)).arrayBuffer());
            if (path.includes('entries')) all[10] ^= 1;
            return all;
        };
        const text = async (path) => (await fetch(`/tlog/${path}`)).text();
        const proof = await prove(1, bytes, text);
        return { proven: proof.proven, failed: proof.steps.filter((s) => !s.ok).length };
    })";
    assert_eq!(
        page.evaluate(forged),
        json!({ "proven": false, "failed": 1 })
    );
    // Nor is one proven that the tree has, where the server shows another.
    page.evaluate(
        "window.honest = window.fetch;
         window.fetch = (url, ...rest) =>
             honest(url === '/api/v1/events/2' ? '/api/v1/events/3' : url, ...rest);
         location.hash = '#/ledger/2'",
    );
    page.shows("is NOT what the signed ledger has");
    page.evaluate("window.fetch = honest");

    assert_eq!(page.complaints(), Vec::<String>::new());
    // An address that is none ends nothing. (The browser notes that there is no such deployment.)
    page.evaluate("location.hash = '#/deployments/%'");
    page.shows("This cannot be shown");
    page.evaluate("location.hash = '#/ledger'");
    page.shows("The ledger");
    assert_eq!(page.evaluate("window.kept"), true);

    // A browser has few connections to a server: while nobody looks at the tab there are none.
    let streams = || {
        let metrics = format!("{}/metrics", server.url());
        let figures = request(reqwest::Method::GET, &metrics, &[], None)
            .unwrap()
            .body;
        let mut lines = figures.lines();
        let streams = lines.find_map(|line| line.strip_prefix("daybook_http_streams "));
        streams.unwrap().parse::<u32>().unwrap()
    };
    assert!(streams() > 0);
    page.evaluate(
        "Object.defineProperty(document, 'hidden', { get: () => window.away });
         window.away = true;
         document.dispatchEvent(new Event('visibilitychange'))",
    );
    until("no stream is open", || (streams() == 0).then_some(()));
    page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))");
    until("it follows again", || (streams() > 0).then_some(()));
    server.check_replay();
}

#[test]
fn all_of_the_page_together_takes_less_than_150_kilobytes() {
    let server = Server::start(Settings::default());
    let repository = application("--text one");
    server.define("shop", "web", &repository, &[]);
    let deployed = server.deploy(INSTANCE, &[]);
    let Some(mut page) = Browser::open(&server.url(), (1200, 900)) else {
        return;
    };
    page.shows("web production");
    for view in ["Routes", "History", "Ledger"] {
        page.click("nav a", view);
        page.holds(&format!("document.title.startsWith('{view}')"));
    }
    page.evaluate(&format!("location.hash = '#/deployments/{deployed}'"));
    page.shows("It is live.");
    let fetched = page.fetched();
    let bytes: u64 = fetched.iter().map(|one| one.sent).sum();
    println!("painted after {:?}, {bytes} bytes", page.painted());
    let files = || fetched.iter().filter(|one| one.url.contains("/page/"));
    assert!(files().count() > 10, "{fetched:?}");
    let plain = files().find(|one| one.decoded > 1024 && one.encoded >= one.decoded);
    assert_eq!(plain, None);
    assert!((1..150_000).contains(&bytes), "{bytes}: {fetched:?}");
    assert_eq!(page.complaints(), Vec::<String>::new());
}

#[test]
fn a_deployment_is_followed_step_by_step_while_it_runs() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    // It goes on once there is a file.
    let file = server.folder().path().join("go-on");
    let command = format!(
        "web: while [ ! -e {} ]; do sleep 0.1; done; exec ./bin/app --text one\n",
        file.display()
    );
    source.write("Procfile", command);
    source.commit_all("Wait for a file");
    server.define("shop", "web", &source, &[]);
    let id = server.begin(INSTANCE, &[]);
    server.wait_for(&id, "deploying");
    let address = format!("{}/#/deployments/{id}", server.url());
    let Some(mut page) = Browser::open(&address, (1200, 900)) else {
        return;
    };
    page.shows("What happened");
    page.evaluate("window.kept = true");
    // The step that it is in has no end yet.
    const LAST: &str =
        "document.querySelector('.bars dt:last-of-type')?.textContent === 'deploying'";
    const SO_FAR: &str = "document.querySelector('.bars')?.textContent.includes('so far')";
    page.holds(LAST);
    page.holds(SO_FAR);
    page.holds("document.querySelector('h1 .tag')?.textContent === 'deploying'");
    let lines = "document.querySelectorAll('.timeline li').length";
    let before = page.evaluate(lines).as_u64().unwrap();
    assert!(before > 3, "{before}");
    keep_picture(&mut page, "deployment-under-way");

    std::fs::write(&file, "").unwrap();
    page.shows("It is live.");
    page.holds(&format!("{lines} > {before}"));
    page.holds("document.querySelector('h1 .tag')?.textContent === 'started'");
    page.holds(&format!("!({SO_FAR})"));
    page.shows("in all");
    // A bar for each step on its way, in its order, and the longest of them fills its place.
    let steps =
        page.evaluate("[...document.querySelectorAll('.bars dt')].map((e) => e.textContent)");
    let steps: Vec<&str> = steps
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|s| s.as_str())
        .collect();
    let entered = server.deployment(&id)["entered"].clone();
    let mut moments: Vec<&str> = Vec::new();
    for step in &steps {
        let moment = entered[step.replace(' ', "_")].as_str();
        moments.push(moment.unwrap_or_else(|| panic!("{step} is not in {entered}")));
    }
    assert!(
        steps.contains(&"building") && steps.ends_with(&["deploying"]),
        "{steps:?}"
    );
    assert!(moments.is_sorted(), "{moments:?}");
    let bars = page.evaluate(
        "[...document.querySelectorAll('.bars rect.bar')].map((e) => Number(e.getAttribute('width')))",
    );
    let bars: Vec<f64> = bars
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|b| b.as_f64())
        .collect();
    assert_eq!(bars.len(), steps.len());
    assert!(bars.iter().all(|b| (0.1..=100.0).contains(b)), "{bars:?}");
    assert!(bars.iter().any(|b| *b > 99.0), "{bars:?}");
    assert_eq!(page.evaluate("window.kept"), true);
    assert_eq!(page.complaints(), Vec::<String>::new());
}

#[test]
fn a_failure_says_what_happened_and_what_helps() {
    let server = Server::start(Settings::default());
    let source = application("--exit 3");
    server.define("shop", "web", &source, &[]);
    let id = server.begin(INSTANCE, &[]);
    let address = format!("{}/#/deployments/{id}", server.url());
    let Some(mut page) = Browser::open(&address, (1200, 900)) else {
        return;
    };
    page.shows("What happened");
    page.evaluate("window.kept = true");
    let code = server.wait_for_failure(&id);
    let failure = server.deployment(&id)["failure"].clone();
    for part in [&json!(code), &failure["message"], &failure["remedy"]] {
        page.holds(&format!(
            "[...document.querySelectorAll('.problem')].some((e) => e.textContent.includes({part}))"
        ));
    }
    page.holds("document.querySelector('h1 .tag.bad')?.textContent === 'failed'");
    // What it said before it ended is below.
    page.shows("exiting as told");
    keep_picture(&mut page, "deployment-failed");
    // Its snapshot can be deployed once more, and what is not possible says why.
    page.holds("Boolean(document.getElementById('act-redeploy'))");
    page.holds("document.getElementById('act-stop') === null");
    assert_eq!(page.evaluate("window.kept"), true);
    assert_eq!(page.complaints(), Vec::<String>::new());
}

#[test]
fn what_runs_in_one_environment_is_promoted_to_another() {
    let server = Server::start(Settings::default());
    let repository = application("--text one");
    server.define("shop", "web", &repository, &[]);
    server.ok(&["env", "create", "shop", "staging", "--cluster", "local-a"]);
    let first = server.deploy("shop.staging.web", &[]);
    let address = format!("{}/#/environments", server.url());
    let Some(mut page) = Browser::open(&address, (1200, 900)) else {
        return;
    };
    page.shows("Environments side by side");
    page.evaluate("window.kept = true");
    let choice = "select[aria-label='promote web of staging to']";
    page.fill(choice, "production");
    page.shows("Promote web to production?");
    keep_picture(&mut page, "promote");
    page.evaluate("document.querySelector('dialog input').value = 'it was looked at'");
    page.click("dialog[open] button", "Promote");
    // It leads to what it has begun.
    page.holds("location.hash.startsWith('#/deployments/')");
    let hash = page.evaluate("location.hash");
    let id = hash
        .as_str()
        .unwrap()
        .rsplit('/')
        .next()
        .unwrap()
        .to_owned();
    assert_ne!(id, first);
    server.wait_for(&id, "started");
    page.shows("It is live.");
    page.shows("promoted from");
    let promoted = server.deployment(&id);
    assert_eq!(promoted["promoted_from"]["deployment"], first.as_str());
    assert_eq!(promoted["reason"], "it was looked at");
    let digest = |id: &str| server.deployment(id)["image"]["digest"].clone();
    assert_eq!(digest(&id), digest(&first));
    assert_eq!(page.evaluate("window.kept"), true);
    assert_eq!(page.complaints(), Vec::<String>::new());
}

/// Goes from the beginning of the page to its end with the Tab key alone, and is at everything that can be used, in its
/// order, and sees where it is.
#[track_caller]
fn walk(page: &mut Browser, view: &str) {
    until(&format!("the keyboard reaches all of {view}"), || {
        let all = page.evaluate(
            "window.reach = [...document.querySelectorAll(
                'a[href], button, input, select, textarea, summary, [tabindex=\"0\"]')]
                .filter((e) => !e.disabled && e.tabIndex >= 0 && e.checkVisibility());
             document.body.tabIndex = -1;
             document.body.focus();
             reach.length",
        );
        let all = all.as_i64()?;
        let mut seen = Vec::new();
        // Boxes that scroll are reached as well.
        for _ in 0..3 * all {
            page.press("Tab");
            let at = page.evaluate(
                "(() => {
                    const at = document.activeElement;
                    const isSeen = getComputedStyle(at).outlineStyle !== 'none';
                    return [reach.indexOf(at), isSeen || at === document.body, at.outerHTML];
                })()",
            );
            assert_eq!(at[1], true, "{view}: nothing shows where one is: {at}");
            seen.extend(at[0].as_i64().filter(|n| *n >= 0));
            if seen.last() == Some(&(all - 1)) {
                break;
            }
        }
        // Something may have been drawn anew meanwhile: then it is begun again.
        (all > 0 && seen == (0..all).collect::<Vec<_>>()).then_some(())
    });
}

/// Presses Tab until what is at is what an expression of `at` says.
#[track_caller]
fn tab_to(page: &mut Browser, is_there: &str) {
    page.evaluate("document.body.tabIndex = -1; document.body.focus()");
    until(&format!("the keyboard is where {is_there}"), || {
        page.press("Tab");
        let there = page.evaluate(&format!("((at) => {is_there})(document.activeElement)"));
        (there == true).then_some(())
    });
}

#[test]
fn the_keyboard_alone_reaches_and_does_everything() {
    let server = Server::start(Settings::default());
    let repository = application("--text one");
    server.define("shop", "web", &repository, &[]);
    let id = server.deploy(INSTANCE, &[]);
    let Some(mut page) = Browser::open(&server.url(), (1200, 900)) else {
        return;
    };
    page.shows("web production");
    // The first stop leads past the navigation.
    page.press("Tab");
    assert_eq!(page.evaluate("document.activeElement.className"), "skip");
    walk(&mut page, "the overview");
    for (view, shown) in [
        ("Routes", "Where each address leads"),
        ("History", "Choose two"),
    ] {
        tab_to(
            &mut page,
            &format!("at.closest('nav') && at.textContent === '{view}'"),
        );
        page.press("Enter");
        page.shows(shown);
        walk(&mut page, view);
    }
    page.evaluate(&format!("location.hash = '#/deployments/{id}'"));
    page.shows("It is live.");
    walk(&mut page, "a deployment");

    // What a button asks is answered, or left, without a mouse, and one is at the button again.
    tab_to(&mut page, "at.id === 'act-stop'");
    page.press("Enter");
    page.holds("document.querySelector('dialog[open]')?.contains(document.activeElement)");
    for _ in 0..6 {
        page.press("Tab");
        // Between its end and its beginning is the browser's own.
        page.holds(
            "document.activeElement === document.body
                || document.querySelector('dialog[open]').contains(document.activeElement)",
        );
    }
    page.press("Escape");
    page.holds("!document.querySelector('dialog')");
    page.holds("document.activeElement.id === 'act-stop'");
    assert_eq!(server.deployment(&id)["state"], "started");
    page.press("Enter");
    page.holds("Boolean(document.querySelector('dialog[open]'))");
    tab_to(
        &mut page,
        "at.closest('dialog') && at.textContent === 'Stop'",
    );
    page.press("Enter");
    server.wait_for(&id, "stopped");
    page.holds("document.querySelector('h1 .tag')?.textContent === 'stopped'");
    assert_eq!(page.complaints(), Vec::<String>::new());
}

#[test]
fn a_plan_is_shown_and_allowed_by_who_says_so() {
    let server = Server::start(Settings::default());
    let Some(mut page) = Browser::open(&format!("{}/#/approvals", server.url()), (1200, 900))
    else {
        return;
    };
    page.shows("Nothing waits");
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    server.ok(&["env", "set", "shop", "production", "--approvals", "1"]);
    let id = server.begin(INSTANCE, &["--actor", "ada"]);
    server.wait_for(&id, "awaiting_approval");
    let shown = server.json(&["approvals", "show", &id]);
    page.shows(shown["hash"].as_str().unwrap());
    page.shows("web.shop.localhost new");
    // Who asked for it cannot allow it, and is told so.
    let name = |name: &str| {
        format!(
            "const actor = document.querySelector('input[name=actor]'); actor.value = '{name}';
             actor.dispatchEvent(new Event('change'))"
        )
    };
    page.evaluate(&format!("{{ {} }}", name("ada")));
    page.click("button", "Approve this plan");
    page.click("dialog[open] button", "Approve");
    page.shows("ada asked for this deployment");
    page.evaluate(&format!("{{ {} }}", name("bob")));
    page.click("button", "Approve this plan");
    page.click("dialog[open] button", "Approve");
    server.wait_for(&id, "started");
    page.shows("Nothing waits");
    // The refusal is an answer that a browser complains of.
    assert_eq!(page.complaints().len(), 1, "{:?}", page.complaints());
}

#[test]
fn on_a_phone_nothing_is_wider_than_the_screen_and_everything_has_a_name() {
    let server = Server::start(Settings::default().arg("--allow-private-webhooks"));
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let id = server.deploy(INSTANCE, &[]);
    // A webhook whose receiver takes one event, and not the next one.
    let receiver = Receiver::start(|_, before| match before.len() {
        0 => (204, Vec::new()),
        _ => (500, Vec::new()),
    });
    let flags = ["--tries", "1", "--kind", "environment"];
    let webhook = webhook(&server, &receiver.url(), &flags);
    for name in ["staging", "preview"] {
        server.ok(&["env", "create", "shop", name]);
    }
    until("one is set aside", || {
        let seen = server.read(&format!("/api/v1/webhooks/{webhook}"));
        (seen["dead_letters"][0]["code"] == "status_500").then_some(())
    });
    let Some(mut page) = Browser::open(&server.url(), (390, 800)) else {
        return;
    };
    let axe = node().map(|modules| {
        std::fs::read_to_string(modules.join("axe-core/axe.min.js")).expect("axe-core is there")
    });
    page.shows("web production");
    let views = [
        "",
        "environments",
        "routes",
        "history",
        "approvals",
        "delivery",
        "logs",
        "logs?project=shop&q=LISTENING&type=container",
        "webhooks",
        "ledger",
        "ledger/1",
    ];
    let views = views.map(str::to_owned).into_iter();
    for view in views.chain([format!("webhooks/{webhook}"), format!("deployments/{id}")]) {
        page.evaluate(&format!("location.hash = '#/{view}'"));
        let heading = match view.split(['/', '?']).next().unwrap_or_default() {
            "" => "What runs where",
            "environments" => "Environments side by side",
            "routes" => "Where each address leads",
            "history" => "Choose two",
            "approvals" => "Nothing waits",
            "delivery" => "1 (0.03 a day)",
            "logs" if view.contains('?') => "1 found",
            "logs" => "lines that are kept were looked at",
            "webhooks" if view.contains('/') => "Set aside undelivered",
            "webhooks" => "1 set aside",
            "ledger" if view.contains('/') => "In this browser",
            "ledger" => "The ledger",
            _ => "What can be done",
        };
        page.shows(heading);
        let wide = page.evaluate("document.documentElement.scrollWidth - innerWidth");
        assert!(wide.as_i64() <= Some(0), "{view}: {wide} pixels too wide");
        let nameless = page.evaluate(
            "[...document.querySelectorAll('button, a, input, select')].filter((e) =>
                !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length))
                .map((e) => e.outerHTML)",
        );
        assert_eq!(nameless, json!([]), "{view}");
        for (dark, axe) in [false, true].into_iter().zip(axe.iter().cycle()) {
            page.prefers_dark(dark);
            assert_eq!(page.barriers(axe), json!([]), "{view}, dark: {dark}");
            let shade = if dark { "dark" } else { "light" };
            let kind = view.split(['/', '?']).next().unwrap_or_default();
            let of_one = if view.contains(['/', '?']) {
                "-one"
            } else {
                ""
            };
            keep_picture(&mut page, &format!("phone-{kind}{of_one}-{shade}"));
        }
    }
    assert_eq!(page.complaints(), Vec::<String>::new());
}

#[test]
fn whoever_signs_in_is_told_what_is_wrong_and_can_sign_out() {
    let settings = Settings::default().arg("--auth").arg("required");
    let server = Server::start(settings);
    let admin = server.process().fact("admin_token");
    let Some(mut page) = Browser::open(&server.url(), (1200, 900)) else {
        return;
    };
    let run = |args: &[&str]| {
        let mut command = server.command(args);
        let done = Done::of(command.env("DAYBOOK_TOKEN", &admin));
        assert_eq!(done.code, 0, "{done:?}");
        done.stdout.trim().to_owned()
    };
    let viewer = run(&["token", "create", "reads", "--role", "viewer"]);
    let sign_in = |page: &mut Browser, token: &str| {
        page.shows("Sign in");
        page.evaluate(&format!(
            "document.querySelector('form.sign-in input').value = {}",
            json!(token)
        ));
        page.click("form.sign-in button", "Sign in");
    };
    // What is no token, or none that is taken, is not kept.
    sign_in(&mut page, "токен");
    page.shows("This is no token");
    let unknown = format!("daybook_{}_{}", "0".repeat(12), "0".repeat(64));
    sign_in(&mut page, &unknown);
    page.shows("the token is not one that this server takes");
    let kept = "sessionStorage.getItem('daybook-token')";
    assert_eq!(page.evaluate(kept), json!(null));
    sign_in(&mut page, &viewer);
    page.shows("Nothing yet.");
    page.shows("reads");
    page.shows("Sign out");
    // A token that ends while the page is open is asked for again.
    run(&["token", "revoke", "reads"]);
    page.shows("the token is revoked");
    sign_in(&mut page, &admin);
    page.shows("Nothing yet.");
    page.click("button", "Sign out");
    page.shows("Sign in");
    assert_eq!(page.evaluate(kept), json!(null));
}

/// Makes a webhook of the project `shop`, and returns its id.
fn webhook(server: &Server, url: &str, flags: &[&str]) -> String {
    let made = server.json(&[&["webhook", "create", "shop", url], flags].concat());
    made["webhook"]["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_webhook_is_made_watched_and_mended_without_a_reload() {
    let server = Server::start(Settings::default().arg("--allow-private-webhooks"));
    server.ok(&["project", "create", "shop"]);
    let works = Arc::new(AtomicBool::new(true));
    let receiver = {
        let works = works.clone();
        // What is about `slow` is to be tried again in an hour.
        Receiver::start(move |r, _| match r.json()["data"]["name"].as_str() {
            Some("slow") => (503, vec![("Retry-After", "3600".into())]),
            _ if works.load(Ordering::SeqCst) => (204, Vec::new()),
            _ => (500, Vec::new()),
        })
    };
    let Some(mut page) = Browser::open(&format!("{}/#/webhooks", server.url()), (1200, 900)) else {
        return;
    };
    page.shows("Nothing is sent anywhere yet.");
    page.evaluate("window.kept = true");

    // What is refused is said where it was filled in, with what helps; then it can be put right.
    page.click("button", "New webhook");
    page.fill("dialog input[name=url]", "https://user:pw@example.com/");
    page.fill("dialog input[name=kinds]", "environment");
    page.fill("dialog input[name=tries]", "1");
    page.click("dialog[open] button", "Create");
    page.holds(
        "!!document.querySelector('dialog .problem strong')?.textContent.match(/^[a-z_]+$/)",
    );
    page.holds("!!document.querySelector('dialog .problem .quiet')?.textContent");
    keep_picture(&mut page, "webhook-refused");
    page.fill("dialog input[name=url]", &receiver.url());
    page.click("dialog[open] button", "Create");
    page.shows("It is shown this once");
    keep_picture(&mut page, "webhook-secret");
    let secret = "document.querySelector('dialog input[readonly]').value";
    let first = page.evaluate(secret).as_str().unwrap().to_owned();
    page.click("dialog[open] button", "It is kept");
    page.shows("delivering");
    page.shows("Nothing was sent yet.");
    let id = page.evaluate("location.hash.split('/')[2]");
    let id = id.as_str().unwrap().to_owned();
    assert_eq!(
        page.evaluate("document.body.innerHTML.includes('whsec_')"),
        false
    );

    // Each try comes to the page as it is made.
    page.click("button", "Send a test");
    page.shows("subscription.test_requested.v1");
    page.shows("delivered");
    let signed = |secret: &str| receiver.all().last().unwrap().signed_by(secret);
    assert_eq!(signed(&first), 1);
    works.store(false, Ordering::SeqCst);
    for name in ["one", "two"] {
        server.ok(&["env", "create", "shop", name]);
    }
    page.shows("2 set aside");
    page.shows("Set aside undelivered");
    page.shows("status_500");
    keep_picture(&mut page, "webhook");

    // One is sent again and the other one never.
    works.store(true, Ordering::SeqCst);
    let dead = server.read(&format!("/api/v1/webhooks/{id}"))["dead_letters"].clone();
    let positions: Vec<_> = dead
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d["position"].clone())
        .collect();
    page.evaluate(&format!(
        "document.getElementById('webhook-replay-{}').click()",
        positions[0]
    ));
    page.shows("1 set aside");
    page.evaluate(&format!(
        "document.getElementById('webhook-discard-{}').click()",
        positions[1]
    ));
    page.click("dialog[open] button", "Discard");
    page.holds("!document.body.innerText.includes('Set aside undelivered')");
    assert_eq!(
        receiver.taken().last().unwrap().json()["data"]["name"],
        "one"
    );

    // What somebody else has defined meanwhile is not overwritten.
    page.click("button", "Change…");
    page.fill("dialog input[name=tries]", "5");
    server.ok(&["webhook", "change", &id, "--service", "web"]);
    page.click("dialog[open] button", "Change");
    page.shows("webhook_changed");
    keep_picture(&mut page, "webhook-changed");
    let shown = server.read(&format!("/api/v1/webhooks/{id}"));
    assert_eq!(shown["service"], "web");
    assert_eq!(shown["tries"], 1);
    page.click("dialog[open] button", "Leave it");
    page.holds("!document.querySelector('dialog')");
    page.shows("about the service web");
    server.ok(&["webhook", "change", &id, "--service", ""]);
    page.holds("!document.body.innerText.includes('about the service web')");

    // What is asked for again later is shown as that.
    page.click("button", "Change…");
    page.fill("dialog input[name=tries]", "5");
    page.click("dialog[open] button", "Change");
    page.holds("!document.querySelector('dialog')");
    server.ok(&["env", "create", "shop", "slow"]);
    page.shows("retrying");
    page.shows("after 1 of 5 tries");
    page.shows("status_503");
    keep_picture(&mut page, "webhook-retrying");
    page.fill("select[name=outcome]", "failed");
    page.holds("document.querySelectorAll('table[aria-label=Deliveries] tbody tr').length === 1");
    page.fill("select[name=outcome]", "");
    page.holds("document.querySelectorAll('table[aria-label=Deliveries] tbody tr').length > 3");

    // Another secret: for a while deliveries are signed with both.
    page.click("button", "Another secret…");
    page.click("dialog[open] button", "Make another");
    page.shows("It is shown this once");
    let second = page.evaluate(secret).as_str().unwrap().to_owned();
    assert_ne!(first, second);
    page.click("dialog[open] button", "It is kept");
    page.shows("two secrets");
    let before = receiver.taken().len();
    page.click("button", "Send a test");
    until("the test is taken", || {
        (receiver.taken().len() > before).then_some(())
    });
    let last = receiver.taken().pop().unwrap();
    assert_eq!((last.signed_by(&first), last.signed_by(&second)), (1, 1));

    // It is paused and goes on, by whoever does it.
    page.click("button", "Pause");
    page.shows("Somebody paused it.");
    server.ok(&["webhook", "resume", &id]);
    page.holds("!document.body.innerText.includes('Somebody paused it.')");
    // The list has it in the same words.
    page.click("nav a", "Webhooks");
    page.shows("tries again");
    page.shows(&receiver.url());
    keep_picture(&mut page, "webhooks");
    page.click("main a", &receiver.url());
    page.shows("Deliveries");
    page.click("button", "Delete…");
    page.click("dialog[open] button", "Delete");
    page.shows("Nothing is sent anywhere yet.");
    // Where somebody else deletes it, it is said.
    let other = webhook(&server, &receiver.url(), &[]);
    page.click("main a", &receiver.url());
    page.shows("Nothing was sent yet.");
    server.ok(&["webhook", "delete", &other, "--yes"]);
    page.shows("This webhook was deleted.");
    assert_eq!(page.evaluate("window.kept"), true);
    // What was refused is an answer that a browser complains of.
    assert_eq!(page.complaints().len(), 2, "{:?}", page.complaints());
}

#[test]
fn output_is_looked_for_and_found_in_its_place() {
    let server = Server::start(Settings::default());
    let source = application("--print 400");
    server.define("shop", "web", &source, &[]);
    let older = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--print 3");
    let newer = server.deploy(INSTANCE, &[]);
    let Some(mut page) = Browser::open(&format!("{}/#/logs", server.url()), (1200, 900)) else {
        return;
    };
    page.evaluate("window.kept = true");
    page.shows("lines that are kept were looked at");
    page.fill("input[name=q]", "LINE 3");
    page.fill("select[name=type]", "container");
    page.evaluate("document.querySelector('input[name=q]').focus()");
    page.press("Enter");
    // Three, thirty to thirty-nine, and three hundred and so on: a hundred at once, the newest
    // deployment first.
    page.shows("100 found");
    let count = |page: &mut Browser, of: &str| {
        let all = page.evaluate(&format!("document.querySelectorAll('{of}').length"));
        all.as_u64().unwrap()
    };
    assert_eq!(count(&mut page, ".found li"), 100);
    assert_eq!(count(&mut page, ".found mark"), 100);
    assert_eq!(count(&mut page, ".found section"), 2);
    keep_picture(&mut page, "logs");
    page.click("button", "Look at older ones");
    page.shows("112 found");
    assert_eq!(count(&mut page, ".found li"), 112);
    let address = page.evaluate("location.hash");
    assert_eq!(address, "#/logs?project=shop&q=LINE+3&type=container");

    // A line leads to its place in its deployment, whatever was printed before and after it.
    let last = "[...document.querySelectorAll('.found li')].find((l) => l.innerText.includes('line 321')).querySelector('a').click()";
    page.evaluate(last);
    page.shows("Around the line that you were sent to");
    page.holds("document.activeElement.className.includes('wanted')");
    let wanted = page.evaluate("document.activeElement.textContent");
    assert!(wanted.as_str().unwrap().ends_with("line 321\n"), "{wanted}");
    let hash = page.evaluate("location.hash");
    assert!(hash.as_str().unwrap().contains(&older), "{hash}");
    page.shows("line 250");
    keep_picture(&mut page, "logs-in-place");
    page.evaluate("history.back()");
    page.shows("100 found");

    // Nothing found, a filter that is refused, and narrowing down by time and level.
    page.fill("input[name=q]", "no such line");
    page.click("form.search button", "Search");
    page.shows("Nothing was found");
    page.fill("input[name=cluster]", "No Cluster");
    page.click("form.search button", "Search");
    page.holds("!!document.querySelector('main .problem .quiet')");
    page.fill("input[name=cluster]", "");
    page.fill("input[name=q]", "");
    page.fill("select[name=level]", "error");
    page.click("form.search button", "Search");
    page.shows("Nothing was found");
    page.fill("select[name=level]", "");
    page.fill("input[name=from]", "2040-01-01T00:00:00");
    page.click("form.search button", "Search");
    page.shows("Nothing was found");

    // While it is read something else is deployed: nothing moves, and it is said.
    replace_flags(&source, "--print-every 200");
    let third = server.deploy(INSTANCE, &[]);
    page.shows("There may be newer output.");
    // What runs goes on printing into its page, where it can be searched.
    page.evaluate(&format!("location.hash = '#/deployments/{third}'"));
    page.shows("tick 3");
    page.fill("input[aria-label='Search in the output']", "tick");
    page.holds("document.querySelectorAll('pre.lines mark').length > 8");
    keep_picture(&mut page, "deployment");
    page.fill("select[aria-label='Kind of lines']", "build");
    page.holds("document.querySelectorAll('pre.lines mark').length === 0");
    assert_eq!(page.evaluate("window.kept"), true);
    assert_eq!(page.complaints().len(), 1, "{:?}", page.complaints());

    // The file has them all, however many pages that would be.
    let file = |accept: &str| {
        let url = format!(
            "{}/api/v1/projects/shop/logs?q=line&type=container&until=2040-01-01T00:00:00Z&download=true",
            server.url()
        );
        request(reqwest::Method::GET, &url, &[("Accept", accept)], None).unwrap()
    };
    let text = file("text/plain");
    assert_eq!(
        text.headers["content-disposition"],
        "attachment; filename=\"shop.log\""
    );
    assert_eq!(text.body.lines().count(), 403);
    let (first, last) = (
        text.body.lines().next().unwrap(),
        text.body.lines().last().unwrap(),
    );
    assert!(
        first.contains(&format!(" production.web {newer} ")),
        "{first}"
    );
    assert!(
        last.ends_with("[INFO] line 400") || last.ends_with("[INFO] line 399"),
        "{last}"
    );
    let json = file("application/x-ndjson");
    assert_eq!(json.body.lines().count(), 403);
    let line: serde_json::Value = serde_json::from_str(json.body.lines().next().unwrap()).unwrap();
    assert_eq!(line["deployment"], newer.as_str());
}

#[test]
fn whoever_may_only_look_is_offered_nothing_else() {
    let settings = Settings::default().arg("--auth").arg("required");
    let server = Server::start(settings.arg("--allow-private-webhooks"));
    let admin = server.process().fact("admin_token");
    let run = |args: &[&str]| {
        let mut command = server.command(args);
        let done = Done::of(command.env("DAYBOOK_TOKEN", &admin));
        assert_eq!(done.code, 0, "{done:?}");
        done.stdout.trim().to_owned()
    };
    run(&["project", "create", "shop"]);
    let receiver = Receiver::willing();
    run(&["webhook", "create", "shop", &receiver.url()]);
    let viewer = run(&["token", "create", "reads", "--role", "viewer"]);
    let Some(mut page) = Browser::open(&format!("{}/#/webhooks", server.url()), (1200, 900)) else {
        return;
    };
    let sign_in = |page: &mut Browser, token: &str| {
        page.fill("form.sign-in input", token);
        page.click("form.sign-in button", "Sign in");
    };
    let buttons = "[...document.querySelectorAll('main button')].filter((b) => b.checkVisibility())
        .map((b) => b.textContent)";
    sign_in(&mut page, &viewer);
    page.shows("that takes the role admin in this project");
    assert_eq!(page.evaluate(buttons), json!([]));
    page.click("main a", &receiver.url());
    page.shows("Nothing was sent yet.");
    page.shows("that takes the role admin in this project");
    assert_eq!(page.evaluate(buttons), json!([]));
    page.click("button", "Sign out");
    sign_in(&mut page, &admin);
    page.shows("Nothing was sent yet.");
    assert_eq!(
        page.evaluate(buttons),
        json!([
            "Send a test",
            "Pause",
            "Another secret…",
            "Change…",
            "Delete…"
        ])
    );
}

#[test]
fn an_address_is_shown_plane_by_plane_as_it_drifts() {
    let edge = Edge::start();
    let server = Server::start(edge.settings());
    let gateway = server.gateway().replace("http://", "").parse().unwrap();
    edge.website.conduct(Conduct::Forward(gateway));
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let id = server.deploy(INSTANCE, &[]);
    server.ok(&["domain", "add", INSTANCE, HOST]);
    wait_for(&server, &id, "http", "ok", "Answers");
    let address = format!("{}/#/deployments/{id}", server.url());
    let Some(mut page) = Browser::open(&address, (1200, 900)) else {
        return;
    };
    page.shows("From where users are");
    for plane in ["metadata", "route object", "DNS", "TLS", "HTTP"] {
        page.shows(plane);
    }
    page.shows("the certificate ends");
    page.evaluate("window.kept = true");
    edge.nameserver.point(HOST, "127.0.0.2");
    page.shows("WrongAddress");
    page.shows("expected 127.0.0.1");
    page.shows("found 127.0.0.2");
    keep_picture(&mut page, "planes");
    assert_eq!(page.evaluate("window.kept"), true);
    assert_eq!(page.complaints(), Vec::<String>::new());
}
