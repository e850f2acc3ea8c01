//! Ways to a destination that is not dialled by an agent.

pub mod direct;
