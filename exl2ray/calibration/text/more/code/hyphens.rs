//! Hyphenation with Liang's patterns, for the label printer.
//!
//! A pattern such as `.ach4` or `1tio` is a piece of a word with digits between the letters. For a word, every
//! pattern that occurs in it (with dots marking its ends) writes its digits into the gaps, the largest digit in
//! a gap wins, and a break is allowed where the winner is odd. Patterns are kept in a flat trie.

use std::collections::HashMap;

#[derive(Default)]
struct Node {
    next: HashMap<char, u32>,
    /// Digits of the pattern that ends here: (gap counted from the start of the pattern, value).
    points: Box<[(u8, u8)]>,
}

pub struct Hyphenator {
    nodes: Vec<Node>,
    exceptions: HashMap<String, Vec<usize>>,
    left_min: usize,
    right_min: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub enum PatternError {
    Empty { line: usize },
    DoubleDigit { line: usize },
}

impl Hyphenator {
    /// One pattern per line; `%` starts a comment. Lines with a hyphen in them are exceptions, as in `ta-ble`.
    pub fn parse(source: &str, left_min: usize, right_min: usize) -> Result<Self, PatternError> {
        let mut this = Hyphenator { nodes: vec![Node::default()], exceptions: HashMap::new(), left_min, right_min };
        for (i, raw) in source.lines().enumerate() {
            let line = raw.split('%').next().unwrap_or("").trim();
            if line.is_empty() {
                continue;
            }
            if line.contains('-') {
                this.add_exception(line);
            } else {
                this.add_pattern(line, i + 1)?;
            }
        }
        Ok(this)
    }

    fn add_exception(&mut self, line: &str) {
        let mut breaks = Vec::new();
        let mut word = String::with_capacity(line.len());
        let mut letters = 0;
        for c in line.chars() {
            if c == '-' {
                breaks.push(letters);
            } else {
                word.extend(c.to_lowercase());
                letters += 1;
            }
        }
        self.exceptions.insert(word, breaks);
    }

    fn add_pattern(&mut self, pattern: &str, line: usize) -> Result<(), PatternError> {
        let mut at = 0usize;
        let mut letters = 0u8;
        let mut points: Vec<(u8, u8)> = Vec::new();
        for c in pattern.chars() {
            if let Some(digit) = c.to_digit(10) {
                if points.last().is_some_and(|&(gap, _)| gap == letters) {
                    return Err(PatternError::DoubleDigit { line });
                }
                points.push((letters, digit as u8));
                continue;
            }
            letters += 1;
            at = match self.nodes[at].next.get(&c) {
                Some(&n) => n as usize,
                None => {
                    let n = self.nodes.len();
                    self.nodes.push(Node::default());
                    self.nodes[at].next.insert(c, n as u32);
                    n
                }
            };
        }
        if at == 0 {
            return Err(PatternError::Empty { line });
        }
        self.nodes[at].points = points.into_boxed_slice();
        Ok(())
    }

    /// Numbers of letters after which `word` may be broken, in rising order.
    pub fn breaks(&self, word: &str) -> Vec<usize> {
        let lower = word.to_lowercase();
        if let Some(known) = self.exceptions.get(&lower) {
            return known.clone();
        }
        let framed: Vec<char> = std::iter::once('.').chain(lower.chars()).chain(std::iter::once('.')).collect();
        let n = framed.len() - 2;
        if n < self.left_min + self.right_min {
            return Vec::new();
        }

        let mut level = vec![0u8; framed.len() + 1];
        for start in 0..framed.len() {
            let mut at = 0usize;
            for c in &framed[start..] {
                match self.nodes[at].next.get(c) {
                    Some(&n) => at = n as usize,
                    None => break,
                }
                for &(gap, value) in self.nodes[at].points.iter() {
                    let slot = &mut level[start + gap as usize];
                    *slot = (*slot).max(value);
                }
            }
        }
        // Gap g of the framed word lies after letter g - 1, the leading dot being in the way.
        (self.left_min..=n - self.right_min).filter(|&k| level[k + 1] % 2 == 1).collect()
    }

    /// The word with soft hyphens in it.
    pub fn soften(&self, word: &str) -> String {
        let breaks = self.breaks(word);
        let mut out = String::with_capacity(word.len() + 2 * breaks.len());
        for (i, c) in word.chars().enumerate() {
            if breaks.binary_search(&i).is_ok() {
                out.push('\u{ad}');
            }
            out.push(c);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "hy3ph\nhe2n\nhena4\nhen5at\n1na\nn2at\n1tio\n2io % keeps -tion together\nta-ble\n";

    #[test]
    fn textbook_word() {
        let h = Hyphenator::parse(SMALL, 2, 2).unwrap();
        assert_eq!(h.breaks("hyphenation"), [2, 6]);
    }

    #[test]
    fn exceptions_win_and_case_is_ignored() {
        let h = Hyphenator::parse(SMALL, 2, 3).unwrap();
        assert_eq!(h.soften("Table"), "Ta\u{ad}ble");
    }

    #[test]
    fn short_words_stay_whole() {
        assert!(Hyphenator::parse("1a", 2, 3).unwrap().breaks("data").is_empty());
    }

    #[test]
    fn two_digits_in_one_gap_are_a_typing_error() {
        assert_eq!(Hyphenator::parse("ok1\na12b", 2, 3).err(), Some(PatternError::DoubleDigit { line: 2 }));
    }
}
