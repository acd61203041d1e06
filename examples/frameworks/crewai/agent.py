"""CrewAI: a crew of one agent with one task and a tool that it may use.

python agent.py "What is 12 plus 30?"
"""

import sys

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool


@tool("add")
def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


def main() -> None:
    calculator = Agent(
        role="Calculator",
        goal="Answer sums exactly",
        backstory="You use the calculator, then say the result.",
        llm=LLM(model="openai/gpt-4o-mini", max_tokens=200),
        tools=[add],
        max_iter=3,
    )
    task = Task(description="{question}", expected_output="The sum.", agent=calculator)
    crew = Crew(agents=[calculator], tasks=[task])
    print(crew.kickoff(inputs={"question": sys.argv[1]}).raw)


if __name__ == "__main__":
    main()
