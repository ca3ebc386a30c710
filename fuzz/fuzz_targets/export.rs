//! Exports: a verdict on any archive.
#![no_main]

use std::io::Cursor;

use daybook_audit::{Options, Source, verify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let input = Box::new(Cursor::new(data.to_vec()));
    if let Ok(source) = Source::archive("fuzzed".to_owned(), input) {
        let options = Options {
            threads: Some(1),
            ..Options::default()
        };
        let _ = verify(source, &options, &mut |_, _| {});
    }
});
