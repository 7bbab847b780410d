//! What the agent itself knows to be wrong.

use super::{AgentAnswer, Finding, Subject};
use crate::status::Status;
use crate::status::fill::NO_SERVER;

/// Whether an agent runs, and should.
pub(super) fn agent(subject: &Subject) -> Vec<Finding> {
    match &subject.agent {
        AgentAnswer::Silent(why) => {
            vec![Finding::problem("agent", why.clone(), "run as root, or see `journalctl -u mesh-agent`")]
        }
        AgentAnswer::Status(_) | AgentAnswer::NotRunning if !subject.config.mesh.enabled => {
            vec![Finding::note(
                "agent",
                "the mesh is switched off on this node (mesh.enabled is false)",
                "mesh-agent up",
            )]
        }
        AgentAnswer::Status(_) => Vec::new(),
        AgentAnswer::NotRunning => vec![Finding::problem(
            "agent",
            "the mesh is switched on and no agent runs",
            "systemctl enable --now mesh-agent, then `journalctl -u mesh-agent` if it does not stay",
        )],
    }
}

/// Servers have a check of their own, which knows more.
pub(super) fn problems(status: &Status) -> Vec<Finding> {
    let problems = status.node.problems.iter().filter(|problem| !problem.what.starts_with(NO_SERVER));
    problems.map(|problem| Finding::problem("mesh", problem.what.clone(), problem.fix.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::status::tests::example;

    fn levels(agent: AgentAnswer, enabled: bool) -> Vec<Level> {
        let mut config = mesh_common::config::Config::default();
        config.mesh.enabled = enabled;
        agent_findings(agent, config).iter().map(|finding| finding.level).collect()
    }

    fn agent_findings(agent: AgentAnswer, config: mesh_common::config::Config) -> Vec<Finding> {
        super::agent(&Subject { config_file: "c.yaml".into(), config, agent })
    }

    #[test]
    fn an_agent_that_should_run_and_does_not_is_a_problem() {
        let status = || AgentAnswer::Status(Box::new(example()));
        assert_eq!(levels(status(), true), []);
        assert_eq!(levels(status(), false), [Level::Note]);
        assert_eq!(levels(AgentAnswer::NotRunning, false), [Level::Note]);
        assert_eq!(levels(AgentAnswer::NotRunning, true), [Level::Problem]);
        assert_eq!(levels(AgentAnswer::Silent("it hangs".to_owned()), true), [Level::Problem]);
    }

    #[test]
    fn what_the_agent_calls_a_problem_is_one_with_its_fix() {
        let found = problems(&example());
        assert_eq!(found[0].fix, "open UDP 7443");
    }
}
