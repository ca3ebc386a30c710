//! Pictures of the page, for people to look at.

use super::Browser;

/// Keeps a picture of the whole page below the tests' own folder.
pub fn keep_picture(page: &mut Browser, name: &str) {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{name}.png")), page.screenshot()).unwrap();
}
