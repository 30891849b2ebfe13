//! A crash-safe spool directory: jobs go in as files, come out in order, and survive a power cut.
//!
//! Layout below the root:
//!
//! ```text
//! tmp/    half-written jobs, swept at start
//! new/    00000000000000000042.job   ready, oldest number first
//! work/   claimed by a worker; moved back to new/ at start
//! dead/   failed more than MAX_ATTEMPTS times, kept for a human
//! ```
//!
//! `rename` within one file system is the only operation we trust to be atomic.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const MAX_ATTEMPTS: u8 = 5;
const MAGIC: [u8; 4] = *b"SPJ1";

#[derive(Debug)]
pub enum SpoolError {
    Io { what: &'static str, path: PathBuf, source: io::Error },
    Corrupt { path: PathBuf, reason: &'static str },
    NotADirectory(PathBuf),
}

impl std::fmt::Display for SpoolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io { what, path, source } => write!(f, "cannot {what} {}: {source}", path.display()),
            Self::Corrupt { path, reason } => write!(f, "{}: {reason}", path.display()),
            Self::NotADirectory(p) => write!(f, "{} exists but is not a directory", p.display()),
        }
    }
}

impl std::error::Error for SpoolError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, SpoolError>;

/// Attach the path to an `io::Error`; a bare "No such file" in a log is worth nothing.
fn io_at<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SpoolError + 'a {
    move |source| SpoolError::Io { what, path: path.to_owned(), source }
}

pub struct Spool {
    root: PathBuf,
    next: u64,
}

/// A claimed job. Dropping it without `done` or `failed` leaves the file in `work/`, where the next
/// start finds it: exactly what should happen when the worker panics.
#[must_use]
pub struct Claim<'s> {
    spool: &'s Spool,
    name: String,
    attempts: u8,
    pub payload: Vec<u8>,
}

impl Spool {
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        for sub in ["tmp", "new", "work", "dead"] {
            let dir = root.join(sub);
            fs::create_dir_all(&dir).map_err(io_at("create", &dir))?;
            if !dir.is_dir() {
                return Err(SpoolError::NotADirectory(dir));
            }
        }
        let mut spool = Spool { root, next: 0 };
        for name in spool.list("tmp")? {
            let path = spool.root.join("tmp").join(name);
            fs::remove_file(&path).map_err(io_at("remove", &path))?;
        }
        for name in spool.list("work")? {
            spool.shift(&name, "work", "new")?;
        }
        // Dead jobs count too: reusing their numbers would let two files fight over one name.
        let mut highest = None;
        for sub in ["new", "dead"] {
            highest = highest.max(spool.list(sub)?.last().and_then(|n| number_of(n)));
        }
        spool.next = highest.map_or(0, |n| n + 1);
        Ok(spool)
    }

    pub fn submit(&mut self, payload: &[u8]) -> Result<u64> {
        let id = self.next;
        let name = format!("{id:020}.job");
        let tmp = self.root.join("tmp").join(&name);
        write_job(&tmp, 0, payload)?;
        self.shift(&name, "tmp", "new")?;
        self.next += 1;
        Ok(id)
    }

    /// The oldest job, or `None`. Losing a race for a file is not an error, just try the next one.
    pub fn claim(&self) -> Result<Option<Claim<'_>>> {
        for name in self.list("new")? {
            match self.shift(&name, "new", "work") {
                Ok(()) => {}
                Err(SpoolError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            }
            let path = self.root.join("work").join(&name);
            match read_job(&path) {
                Ok((attempts, payload)) => {
                    return Ok(Some(Claim { spool: self, name, attempts, payload }));
                }
                Err(SpoolError::Corrupt { path, reason }) => {
                    eprintln!("spool: {}: {reason}, setting it aside", path.display());
                    self.shift(&name, "work", "dead")?;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    fn list(&self, sub: &str) -> Result<Vec<String>> {
        let dir = self.root.join(sub);
        let mut names: Vec<String> = fs::read_dir(&dir)
            .map_err(io_at("list", &dir))?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| number_of(n).is_some())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    fn shift(&self, name: &str, from: &str, to: &str) -> Result<()> {
        let src = self.root.join(from).join(name);
        let dst = self.root.join(to);
        fs::rename(&src, dst.join(name)).map_err(io_at("move", &src))?;
        // Without this the rename itself may be lost in a power cut even though the data is safe.
        File::open(&dst).and_then(|d| d.sync_all()).map_err(io_at("sync", &dst))
    }
}

impl Claim<'_> {
    pub fn done(self) -> Result<()> {
        let path = self.spool.root.join("work").join(&self.name);
        fs::remove_file(&path).map_err(io_at("remove", &path))
    }

    pub fn failed(self) -> Result<()> {
        let attempts = self.attempts.saturating_add(1);
        let tmp = self.spool.root.join("tmp").join(&self.name);
        write_job(&tmp, attempts, &self.payload)?;
        let to = if attempts >= MAX_ATTEMPTS { "dead" } else { "new" };
        self.spool.shift(&self.name, "tmp", to)?;
        self.done()
    }
}

fn number_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".job")?;
    (digits.len() == 20).then(|| digits.parse().ok())?
}

fn write_job(path: &Path, attempts: u8, payload: &[u8]) -> Result<()> {
    let mut f = OpenOptions::new().write(true).create(true).truncate(true).open(path).map_err(io_at("create", path))?;
    let mut head = [0u8; 9];
    head[..4].copy_from_slice(&MAGIC);
    head[4] = attempts;
    head[5..].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    f.write_all(&head).and_then(|()| f.write_all(payload)).and_then(|()| f.sync_all()).map_err(io_at("write", path))
}

fn read_job(path: &Path) -> Result<(u8, Vec<u8>)> {
    let corrupt = |reason| SpoolError::Corrupt { path: path.to_owned(), reason };
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut f| f.read_to_end(&mut bytes)).map_err(io_at("read", path))?;
    let (head, body) = bytes.split_at_checked(9).ok_or_else(|| corrupt("shorter than its header"))?;
    if head[..4] != MAGIC {
        return Err(corrupt("bad magic"));
    }
    let len = u32::from_le_bytes([head[5], head[6], head[7], head[8]]) as usize;
    if body.len() != len {
        return Err(corrupt("length does not match"));
    }
    Ok((head[4], body.to_vec()))
}
