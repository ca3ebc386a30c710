//! The page at `/`, in a real browser.

use serde_json::json;

use crate::judged::node;
use crate::support::{Browser, Done, Server, Settings, application, replace_flags};

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
    page.click("dialog button", "Switch");
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
    page.click("dialog button", "Stop");
    server.wait_for(&second, "stopped");
    page.shows("stopped");
    page.click("button", "Terminate");
    page.click("dialog button", "Leave it");
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
    server.check_replay();
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
    page.click("dialog button", "Approve");
    page.shows("ada asked for this deployment");
    page.evaluate(&format!("{{ {} }}", name("bob")));
    page.click("button", "Approve this plan");
    page.click("dialog button", "Approve");
    server.wait_for(&id, "started");
    page.shows("Nothing waits");
    // The refusal is an answer that a browser complains of.
    assert_eq!(page.complaints().len(), 1, "{:?}", page.complaints());
}

#[test]
fn on_a_phone_nothing_is_wider_than_the_screen_and_everything_has_a_name() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let id = server.deploy(INSTANCE, &[]);
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
        "ledger",
        "ledger/1",
    ];
    let views = views.map(str::to_owned).into_iter();
    for view in views.chain([format!("deployments/{id}")]) {
        page.evaluate(&format!("location.hash = '#/{view}'"));
        let heading = match view.split('/').next().unwrap_or_default() {
            "" => "What runs where",
            "environments" => "Environments side by side",
            "routes" => "Where each address leads",
            "history" => "Choose two",
            "approvals" => "Nothing waits",
            "delivery" => "1 (0.03 a day)",
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
