//! Source repositories of applications.

use std::os::unix::fs::PermissionsExt;

use daybook_testkit::TESTAPP;
use daybook_testkit::git::SourceRepository;

/// A repository of the test application, started with these flags.
pub fn application(flags: &str) -> SourceRepository {
    let source = SourceRepository::new();
    source.write("bin/app", std::fs::read(TESTAPP).unwrap());
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(source.path().join("bin/app"), executable).unwrap();
    replace_flags(&source, flags);
    source
}

/// Commits other flags, and returns the commit's id.
pub fn replace_flags(source: &SourceRepository, flags: &str) -> String {
    source.write("Procfile", format!("web: exec ./bin/app {flags}\n"));
    source.commit_all(&format!("Start with {flags}"))
}

/// A repository of a static site of one page.
pub fn site(text: &str) -> SourceRepository {
    let source = SourceRepository::new();
    source.commit("A page", &[("index.html", text)]);
    source
}
