"""A LangGraph graph: the model must call the tool, the tool runs, the model answers.

python agent.py "What is 12 plus 30?"
"""

import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode


@tool
def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


model = ChatOpenAI(model="gpt-4o-mini", max_tokens=200)
caller = model.bind_tools([add], tool_choice="any", parallel_tool_calls=False)
answerer = model.bind_tools([add])


def call(state: MessagesState) -> dict:
    return {"messages": [caller.invoke(state["messages"])]}


def answer(state: MessagesState) -> dict:
    return {"messages": [answerer.invoke(state["messages"])]}


def main() -> None:
    graph = StateGraph(MessagesState)
    graph.add_node("call", call)
    graph.add_node("tools", ToolNode([add]))
    graph.add_node("answer", answer)
    graph.add_edge(START, "call")
    graph.add_edge("call", "tools")
    graph.add_edge("tools", "answer")
    graph.add_edge("answer", END)
    agent = graph.compile()
    messages = [
        {"role": "system", "content": "Use the calculator, then say the result."},
        {"role": "user", "content": sys.argv[1]},
    ]
    print(agent.invoke({"messages": messages})["messages"][-1].content)


if __name__ == "__main__":
    main()
