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

  test "each page is there, and each module that is not hidden is in a group" do
    docs = Mix.Project.config()[:docs]
    for page <- docs[:extras], do: assert(File.regular?(page), page)
    {:ok, modules} = :application.get_key(:starweave_image, :modules)
    grouped = Enum.flat_map(docs[:groups_for_modules], &elem(&1, 1))

    assert Enum.sort([StarweaveImage | grouped]) ==
             modules |> Enum.filter(&shown?/1) |> Enum.sort()
  end

  # Mix tasks have a list of their own.
  defp shown?(module) do
    source = to_string(module.module_info(:compile)[:source])

    with true <- source =~ "/lib/starweave_image",
         {:docs_v1, _, _, _, documentation, _, _} <- Code.fetch_docs(module),
         do: documentation not in [:hidden, :none],
         else: (_ -> false)
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
