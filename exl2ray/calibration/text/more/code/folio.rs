//! Reconstructs the gathering structure of a manuscript from a list of surviving leaves.
//!
//! A gathering is a stack of sheets folded once, so leaf *i* of *n* is joined to leaf *n + 1 - i*. Catalogues
//! write this as a collation formula, `1-3^8 4^6(-5) 5^4(+2)`: gatherings one to three have eight leaves, the
//! fourth has six and has lost its fifth, and in the fifth a single leaf has been added after the second.

use std::fmt;
use std::iter::Peekable;
use std::str::{CharIndices, FromStr};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Lost(u8),
    Added { after: u8 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gathering {
    pub number: u16,
    pub leaves: u8,
    pub changes: Vec<Change>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaf {
    /// Joined to the leaf with this folio number.
    Conjugate(u16),
    /// Its other half has been cut away: a stub, and the reason to handle it with care.
    Widowed,
    /// Never had another half.
    Singleton,
}

#[derive(Debug, PartialEq, Eq)]
pub enum ParseError {
    Unexpected { at: usize, found: Option<char>, wanted: &'static str },
    OddGathering { at: usize, leaves: u8 },
    NoSuchLeaf { gathering: u16, leaf: u8 },
    NotConsecutive { expected: u16, found: u16 },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unexpected { at, found: Some(c), wanted } => write!(f, "column {}: '{c}' where {wanted} should be", at + 1),
            Self::Unexpected { at, found: None, wanted } => write!(f, "column {}: formula ends, {wanted} is missing", at + 1),
            Self::OddGathering { at, leaves } => {
                write!(f, "column {}: sheets are folded, {leaves} leaves cannot be; note the loss instead", at + 1)
            }
            Self::NoSuchLeaf { gathering, leaf } => write!(f, "gathering {gathering} has no leaf {leaf}"),
            Self::NotConsecutive { expected, found } => write!(f, "gathering {found} follows {}", expected - 1),
        }
    }
}

impl std::error::Error for ParseError {}

struct Parser<'a> {
    chars: Peekable<CharIndices<'a>>,
    len: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self { chars: text.char_indices().peekable(), len: text.len() }
    }

    fn at(&mut self) -> usize {
        self.chars.peek().map_or(self.len, |&(i, _)| i)
    }

    fn unexpected<T>(&mut self, wanted: &'static str) -> Result<T, ParseError> {
        let at = self.at();
        Err(ParseError::Unexpected { at, found: self.chars.peek().map(|&(_, c)| c), wanted })
    }

    fn accept(&mut self, c: char) -> bool {
        self.chars.next_if(|&(_, d)| d == c).is_some()
    }

    fn expect(&mut self, c: char, wanted: &'static str) -> Result<(), ParseError> {
        if self.accept(c) { Ok(()) } else { self.unexpected(wanted) }
    }

    fn number<N: TryFrom<u32>>(&mut self, wanted: &'static str) -> Result<N, ParseError> {
        let mut value: Option<u32> = None;
        while let Some((_, c)) = self.chars.next_if(|&(_, c)| c.is_ascii_digit()) {
            let digit = c as u32 - '0' as u32;
            value = value.unwrap_or(0).checked_mul(10).and_then(|v| v.checked_add(digit));
            if value.is_none() {
                return self.unexpected(wanted);
            }
        }
        match value.map(N::try_from) {
            Some(Ok(n)) => Ok(n),
            _ => self.unexpected(wanted),
        }
    }

    fn changes(&mut self) -> Result<Vec<Change>, ParseError> {
        let mut all = Vec::new();
        if !self.accept('(') {
            return Ok(all);
        }
        loop {
            if self.accept('-') {
                all.push(Change::Lost(self.number("a leaf")?));
            } else if self.accept('+') {
                all.push(Change::Added { after: self.number("a leaf")? });
            } else {
                return self.unexpected("+ or -");
            }
            if self.accept(')') {
                return Ok(all);
            }
            self.expect(',', "a comma or the closing bracket")?;
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collation(pub Vec<Gathering>);

impl FromStr for Collation {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut p = Parser::new(text.trim_end());
        let mut out: Vec<Gathering> = Vec::new();
        loop {
            while p.accept(' ') {}
            if p.chars.peek().is_none() {
                return Ok(Self(out));
            }
            let first: u16 = p.number("the number of a gathering")?;
            let last = if p.accept('-') { p.number("the end of the range")? } else { first };
            p.expect('^', "^ and the number of leaves")?;
            let at = p.at();
            let leaves: u8 = p.number("the number of leaves")?;
            if leaves == 0 || leaves % 2 == 1 {
                return Err(ParseError::OddGathering { at, leaves });
            }
            let changes = p.changes()?;
            for c in &changes {
                let (&leaf, low) = match c {
                    Change::Lost(l) => (l, 1),
                    Change::Added { after } => (after, 0),
                };
                if !(low..=leaves).contains(&leaf) {
                    return Err(ParseError::NoSuchLeaf { gathering: first, leaf });
                }
            }
            let expected = out.last().map_or(first, |g| g.number + 1);
            if first != expected {
                return Err(ParseError::NotConsecutive { expected, found: first });
            }
            out.extend((first..=last).map(|number| Gathering { number, leaves, changes: changes.clone() }));
        }
    }
}

impl Gathering {
    fn lost(&self, leaf: u8) -> bool {
        self.changes.contains(&Change::Lost(leaf))
    }

    /// The leaves as bound today: `Some(i)` for an original leaf, `None` for an inserted one.
    fn bound(&self) -> impl Iterator<Item = Option<u8>> + '_ {
        (0..=self.leaves).flat_map(move |i| {
            let original = (i > 0 && !self.lost(i)).then_some(Some(i));
            let added = self.changes.iter().filter(move |c| **c == Change::Added { after: i }).map(|_| None);
            original.into_iter().chain(added)
        })
    }
}

impl Collation {
    /// One entry per surviving leaf, in folio order starting at 1.
    pub fn leaves(&self) -> Vec<Leaf> {
        let mut out = Vec::new();
        for g in &self.0 {
            let base = out.len() as u16 + 1;
            let bound: Vec<_> = g.bound().collect();
            let folio_of = |leaf: u8| bound.iter().position(|b| *b == Some(leaf)).map(|i| base + i as u16);
            out.extend(bound.iter().map(|b| match b {
                None => Leaf::Singleton,
                Some(i) => folio_of(g.leaves + 1 - i).map_or(Leaf::Widowed, Leaf::Conjugate),
            }));
        }
        out
    }
}

impl fmt::Display for Collation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = self.0.chunk_by(|a, b| a.leaves == b.leaves && a.changes == b.changes);
        for (i, group) in groups.enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            let (a, z) = (&group[0], &group[group.len() - 1]);
            write!(f, "{}", a.number)?;
            if z.number != a.number {
                write!(f, "-{}", z.number)?;
            }
            write!(f, "^{}", a.leaves)?;
            for (k, c) in a.changes.iter().enumerate() {
                f.write_str(if k == 0 { "(" } else { "," })?;
                match c {
                    Change::Lost(l) => write!(f, "-{l}")?,
                    Change::Added { after } => write!(f, "+{after}")?,
                }
            }
            if !a.changes.is_empty() {
                f.write_str(")")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_leaf_leaves_a_widow() {
        let c: Collation = "1^4(-4)".parse().unwrap();
        assert_eq!(c.leaves(), [Leaf::Widowed, Leaf::Conjugate(3), Leaf::Conjugate(2)]);
    }

    #[test]
    fn an_insertion_shifts_the_folios_but_not_the_joins() {
        let c: Collation = "7^4(+2)".parse().unwrap();
        assert_eq!(c.leaves()[0], Leaf::Conjugate(5));
        assert_eq!(c.leaves()[2], Leaf::Singleton);
    }

    #[test]
    fn formulas_survive_a_round_trip() {
        for text in ["1-3^8 4^6(-5) 5^4(+2)", "1^2", "1-12^10(-1,+10)"] {
            assert_eq!(text.parse::<Collation>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn odd_gatherings_are_explained() {
        let e = "1-2^8 3^7".parse::<Collation>().unwrap_err();
        assert_eq!(e, ParseError::OddGathering { at: 8, leaves: 7 });
    }
}
