//! What nodes answer: text as exporters write it, another one for each node, so that an answer of the wrong node or with
//! a piece missing is noticed.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use bytes::{Buf as _, Bytes};

/// Apart enough that two nodes share no order of lines.
const STEP: usize = 7919;

/// The lines of one endpoint.
#[derive(Debug, Clone)]
pub(super) struct Content(Bytes);

impl Content {
    /// As node-exporter's: many short lines.
    pub(super) fn exporter(bytes: usize) -> Self {
        Self::new(bytes, |i| {
            format!(
                "node_cpu_seconds_total{{cpu=\"{}\",mode=\"m{}\"}} {}.25\n",
                i % 8,
                i / 8,
                i * 37
            )
        })
    }

    /// As cadvisor's: long labels.
    pub(super) fn cadvisor(bytes: usize) -> Self {
        Self::new(bytes, |i| {
            format!(
                "container_network_receive_bytes_total{{container=\"app\",id=\"/kubepods/burstable/pod{i:08x}-0000-4000-8000-000000000000\",\
                 image=\"example.com/team/application:1.2.3\",interface=\"eth{}\",namespace=\"production\",pod=\"application-{i}\"}} {} 1700000000000\n",
                i % 4,
                i * 1031
            )
        })
    }

    fn new(bytes: usize, line: impl Fn(usize) -> String) -> Self {
        let mut text = String::new();
        for i in 0.. {
            if text.len() >= bytes {
                break;
            }
            text.push_str(&line(i));
        }
        Self(text.into())
    }

    /// What that node answers, in pieces: its name, then the lines, beginning with another one at each node.
    pub(super) fn of(&self, index: usize, name: &str) -> [Bytes; 3] {
        let near = (index * STEP) % self.0.len().max(1);
        let line = self.0[near..].iter().position(|byte| *byte == b'\n');
        let at = line.map_or(0, |line| near + line + 1);
        let head = format!("# node {name}\n");
        [head.into(), self.0.slice(at..), self.0.slice(..at)]
    }
}

/// Compares an answer with what it has to be, as it comes.
#[derive(Debug)]
pub(super) struct Expected(VecDeque<Bytes>);

impl Expected {
    pub(super) fn new(pieces: [Bytes; 3]) -> Self {
        Self(pieces.into())
    }

    /// Takes the next bytes of the answer.
    pub(super) fn take(&mut self, mut got: &[u8]) -> Result<()> {
        while !got.is_empty() {
            let piece = self.0.front_mut();
            let Some(piece) = piece else {
                anyhow::bail!("{} bytes too many", got.len());
            };
            let common = piece.len().min(got.len());
            ensure!(
                piece[..common] == got[..common],
                "the answer is not this node's"
            );
            piece.advance(common);
            got = &got[common..];
            if piece.is_empty() {
                self.0.pop_front();
            }
        }
        Ok(())
    }

    /// Whether that was all.
    pub(super) fn end(&self) -> Result<()> {
        let missing: usize = self.0.iter().map(Bytes::len).sum();
        ensure!(missing == 0, "{missing} bytes are missing");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(content: &Content, index: usize, name: &str) -> Vec<u8> {
        content.of(index, name).concat()
    }

    #[test]
    fn an_answer_is_taken_whole_and_from_its_node_only() {
        let content = Content::exporter(5_000);
        let answer = whole(&content, 3, "edge0003");
        assert!(answer.len() >= 5_000);
        let check = |answer: &[u8], chunk: usize| {
            let mut expected = Expected::new(content.of(3, "edge0003"));
            answer
                .chunks(chunk)
                .try_for_each(|chunk| expected.take(chunk))
                .and_then(|()| expected.end())
        };
        for chunk in [1, 7, 4096, 10_000] {
            check(&answer, chunk).unwrap();
        }
        let mut flipped = answer.clone();
        flipped[4_000] ^= 1;
        let other = whole(&content, 4, "edge0003");
        let more = [answer.clone(), b"x".to_vec()].concat();
        for wrong in [&flipped, &other, &more, &answer[1..].to_vec()] {
            check(wrong, 512).unwrap_err();
        }
        check(&answer[..answer.len() - 1], 512).unwrap_err();
    }
}
