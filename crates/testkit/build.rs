//! Builds the application that tests run, `app/testapp.rs`, with the compiler alone: a binary
//! target would only be built for tests of this very crate.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=app/testapp.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let app = out.join("testapp");
    let status = Command::new(std::env::var_os("RUSTC").expect("cargo sets RUSTC"))
        .args(["--edition", "2024", "-C", "opt-level=1", "app/testapp.rs"])
        .arg("-o")
        .arg(&app)
        .status()
        .expect("the compiler that runs this script can be run");
    assert!(status.success(), "app/testapp.rs does not compile");
    println!("cargo::rustc-env=DAYBOOK_TESTAPP={}", app.display());
}
