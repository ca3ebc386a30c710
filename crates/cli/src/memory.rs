//! How a server asks the system for memory.

/// Has all threads share as many arenas of the C library's allocator as there are cores.
///
/// By itself glibc makes eight for each core, one for each thread that comes first. What is freed stays in
/// the arena that it came from, and a server has threads that do something large once: beside 150 Applications of Argo CD
/// they kept a tenth of what the process took (ADR 39). Whoever sets `MALLOC_ARENA_MAX`
/// ([mallopt(3)](https://man7.org/linux/man-pages/man3/mallopt.3.html)) is not overruled.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn share_arenas() {
    /// Fewest: a second core is never far.
    const LEAST: usize = 2;
    if std::env::var_os("MALLOC_ARENA_MAX").is_some() {
        return;
    }
    let cores = std::thread::available_parallelism().map_or(LEAST, usize::from);
    let arenas = libc::c_int::try_from(cores.max(LEAST)).unwrap_or(libc::c_int::MAX);
    // SAFETY: it takes two numbers, and is called before there are other threads. That it may be refused
    // hurts nobody.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, arenas);
    }
}

/// Other allocators see to it themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn share_arenas() {}
