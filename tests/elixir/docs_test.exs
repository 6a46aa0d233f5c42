defmodule StarweaveImage.DocsTest do
  # What the documents show can be called: each call of this library in their Elixir, and each function that they name.
  use ExUnit.Case, async: true

  @pages Path.wildcard("{README,CHANGELOG}.md") ++ Path.wildcard("docs/*.{md,cheatmd}")

  test "their blocks of Elixir parse, and the functions in them are public" do
    calls =
      for page <- @pages,
          [_, code] <- Regex.scan(~r/^ *```elixir\n(.*?)^ *```$/ms, File.read!(page)),
          call <- calls(Code.string_to_quoted!(code, file: page)),
          do: {page, call}

    assert length(calls) > 20
    for call <- calls, do: assert(public?(elem(call, 1)), inspect(call))
  end

  test "the functions that they name by module are public" do
    named =
      for page <- @pages,
          [_, module, name, arity] <-
            Regex.scan(~r/`(StarweaveImage[A-Za-z.]*)\.([a-z_]+[?!]?)\/(\d+)`/, File.read!(page)),
          do: {page, {Module.concat([module]), String.to_atom(name), String.to_integer(arity)}}

    assert length(named) > 10
    for name <- named, do: assert(public?(elem(name, 1)), inspect(name))
  end

  defp calls(quoted) do
    {_, calls} =
      Macro.prewalk(quoted, [], fn
        {:|>, _, [left, {call, meta, args}]}, calls ->
          {{call, meta, [left | args]}, calls}

        {{:., _, [{:__aliases__, _, [:StarweaveImage | _] = module}, name]}, _, args} = call,
        calls ->
          {call, [{Module.concat(module), name, length(args)} | calls]}

        other, calls ->
          {other, calls}
      end)

    calls
  end

  defp public?({module, name, arity}),
    do: Code.ensure_loaded?(module) and function_exported?(module, name, arity)
end
